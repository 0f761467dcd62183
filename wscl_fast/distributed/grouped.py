"""What holds a process group, and is copied all the same."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from wscl_fast.distributed.collectives import Group

if TYPE_CHECKING:
    from typing_extensions import Self


class Grouped:
    """Copies share the process group, of which there cannot be two; a pickle of it is refused by name."""

    group: Group

    def __copy__(self) -> Self:
        return self._of(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.group)] = self.group  # as if it had been copied already
        made = memo[id(self)] = self._of({})
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.group is not None:
            kind = type(self).__name__
            raise TypeError(f"group: expected None in a {kind} that is pickled, got a process group")
        return super().__reduce_ex__(protocol)

    def _of(self, state: dict[str, Any]) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(state)
        return made
