"""Drawing in braille dots: each character cell of a terminal holds 2 x 4 of them."""

from __future__ import annotations

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # left and right column, from the top


class Canvas:
    """Dots by column, from the left, and row, from the top: 2 * ``cells`` columns and 4 * ``height`` rows."""

    def __init__(self, cells: int, height: int) -> None:
        self._grid = [[0] * cells for _ in range(height)]

    def set(self, column: int, row: int) -> None:
        """Make a dot."""
        self._grid[row // 4][column // 2] |= _DOTS[column % 2][row % 4]

    def rows(self) -> list[list[str]]:
        """One character for each cell, a space where there is no dot."""
        return [[chr(0x2800 + cell) if cell else " " for cell in row] for row in self._grid]
