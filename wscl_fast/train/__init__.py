"""The trainer: both stages from images to a table, over the public API of the package."""
