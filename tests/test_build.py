"""What an installation says of itself, and how it lives without its extension."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

import wscl_fast
from wscl_fast._ops.extension import _allows_tf32, obstacle, require, runs_on, serves

ROOT = Path(__file__).resolve().parents[1]

# Stands in front of the real import machinery and hides the extension.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "wscl_fast._C":
            raise ImportError("hidden for this test")
sys.meta_path.insert(0, Hide())
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_importing_does_not_import_what_compiles() -> None:
    """Dynamo takes as long as torch itself."""
    done = run("import sys, wscl_fast; print('torch._dynamo' in sys.modules)")
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_what_is_constant_to_a_trace_is_marked_as_torch_marks_it() -> None:
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked)
    assert vars(_allows_tf32) == vars(marked)


def test_build_info_of_a_built_package(extension) -> None:  # type: ignore[no-untyped-def]
    info = wscl_fast.build_info()
    assert info.version == wscl_fast.__version__
    assert info.kernels == "fused"
    assert info.instruction_set == extension.instruction_set()
    assert info.instruction_set in info.built_instruction_sets
    assert f"CPU instruction set: {info.instruction_set}" in str(info)
    assert "CUDA architectures: " in str(info)
    assert extension.multiply_add_peak(1, 0.001) > 1e8
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        extension.multiply_add_peak(0)


def test_without_the_extension_everything_works_with_one_warning() -> None:
    done = run(
        HIDE
        + """
import torch, wscl_fast
from wscl_fast import clustered_infonce
info = wscl_fast.build_info()
assert info.kernels == "fallback" and "hidden for this test" in str(info), info
x = torch.randn(8, 4, requires_grad=True)
clustered_infonce(x, query_clusters=torch.arange(8) // 2).backward()
wscl_fast.ClusteredInfoNCE()(x, torch.arange(8) // 2)
wscl_fast.empty_reserve()
try:
    clustered_infonce(x, query_clusters=torch.arange(8) // 2, impl="fused")
except RuntimeError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert "impl='fused' is not available: hidden for this test" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert "hidden for this test" in done.stderr


@pytest.mark.parametrize(
    ("schema", "said"),
    [(None, "infonce_forward is missing"), ("infonce_forward(Tensor queries) -> Tensor", "is another")],
)
def test_an_extension_of_other_sources_is_told(schema: str | None, said: str) -> None:
    """As an editable install has it whose sources changed and that was not built again."""
    done = run(
        f"""
import sys, types, torch
sys.modules["wscl_fast._C"] = stale = types.ModuleType("wscl_fast._C")
stale.__file__ = "stale.so"
library = torch.library.Library("wscl_fast", "DEF")
if {schema!r}:
    library.define({schema!r})
import wscl_fast
"""
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ImportError: wscl_fast: stale.so was built from other sources" in last
    assert said in last
    assert "install wscl-fast anew" in last


@pytest.mark.usefixtures("extension")
def test_the_instruction_set_can_be_chosen() -> None:
    def start(capability: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "import wscl_fast; print(wscl_fast.build_info().instruction_set)"],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": "", "WSCL_CPU_CAPABILITY": capability},
        )

    assert start("portable").stdout.strip() == "portable"
    assert start("").stderr == ""
    told = start("abacus").stderr
    assert "WSCL_CPU_CAPABILITY: expected one of portable, " in told
    assert "got 'abacus'; using" in told


def set_up(wish: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, "WSCL_CUDA": wish},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no setup.py: an installed package")
@pytest.mark.parametrize(
    ("wish", "code", "said"),
    [
        ("0", 0, "CUDA kernels: none (WSCL_CUDA=0)"),
        ("1", 1, "WSCL_CUDA=1, but "),
        ("yes", 1, "WSCL_CUDA: expected 0 or 1, got 'yes'"),
    ],
)
def test_the_build_says_what_becomes_of_cuda(wish: str, code: int, said: str) -> None:
    if wish == "1" and cpp_extension.CUDA_HOME is not None:
        pytest.skip("this PyTorch can build CUDA kernels")
    done = set_up(wish)
    assert done.returncode == code, done.stderr
    assert f"wscl_fast: {said}" in done.stderr


@pytest.mark.parametrize(
    ("wish", "built", "said"),
    [
        ("", "8.0;8.6;8.9;9.0;10.0;12.0+PTX", ""),
        (" ", "8.0;8.6;8.9;9.0;10.0;12.0+PTX", ""),
        ("9.0a 8.6", "8.6;9.0a", ""),
        ("Hopper", "9.0+PTX", ""),
        ("7.0 7.5 8.0 9.0+PTX", "8.0;9.0+PTX", "not for 7.0, 7.5: they need 8.0"),
        ("7.5", "", "CUDA kernels: none (TORCH_CUDA_ARCH_LIST has none from 8.0 on)"),
        ("abacus", None, "TORCH_CUDA_ARCH_LIST: expected a list such as 8.0;8.6;"),
    ],
)
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no setup.py: an installed package")
def test_architectures_are_built_as_the_extension_reads_them(
    wish: str,
    built: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("sys.argv", ["setup.py", "egg_info"])
    monkeypatch.setenv("WSCL_CUDA", "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    architectures = runpy.run_path(str(ROOT / "setup.py"))["cuda_architectures"]
    if built is None:
        with pytest.raises(SystemExit, match=said):
            architectures()
        return
    assert architectures() == built
    assert said in capsys.readouterr().err
    assert not built or runs_on((9, 0), built)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "8.0;8.6;9.0", True),
        ((8, 9), "8.0;8.6", True),
        ((8, 6), "8.9", False),
        ((9, 0), "8.0;8.6", False),
        ((10, 3), "8.0;9.0a+PTX", True),
        ((7, 5), "8.0;12.0+PTX", False),
        ((12, 1), "8.0 12.0+PTX", True),
        ((8, 0), "", False),
    ],
)
def test_which_devices_are_served(capability: tuple[int, int], architectures: str, runs: bool) -> None:
    assert runs_on(capability, architectures) is runs


def test_why_a_device_is_not_served() -> None:
    """Where there are no kernels, the reason and the fallback are named."""
    with pytest.raises(RuntimeError, match=r"no kernels for device meta.*impl='chunked' works everywhere"):
        require(torch.device("meta"))
    assert obstacle(torch.device("cpu"), torch.float64) == ""


def test_float64_on_cuda_takes_the_chunked_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["wscl_fast._ops.extension"]
    monkeypatch.setattr(module, "_has_cuda_kernel", lambda operator: True)
    monkeypatch.setattr(module, "extension", SimpleNamespace(cuda_architectures="8.0;9.0"))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    assert not serves(device, torch.float64)
    assert serves(device, torch.float32)
    assert serves(device, torch.bfloat16)
    with pytest.raises(RuntimeError, match="no kernels for float64 on CUDA"):
        require(device, torch.float64)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5, the kernels are for 8.0;9.0"):
        require(device, torch.float32)
