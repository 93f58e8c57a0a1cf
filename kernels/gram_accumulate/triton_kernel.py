"""The Triton kernel of gram_accumulate; imported only where Triton is, see `triton`."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Triton gives the types of operands when it compiles.
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _products(
    left,
    right,
    left_rows,
    right_rows,
    left_kept,
    right_kept,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inner products of LEFT rows with RIGHT rows: both are row-major, WIDTH entries a row, read BLOCK at a time."""
    total = tl.zeros((LEFT, RIGHT), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        a = tl.load(left + left_rows[:, None] * WIDTH + columns[None, :], left_kept[:, None] & inside[None, :], 0.0)
        b = tl.load(right + right_rows[:, None] * WIDTH + columns[None, :], right_kept[:, None] & inside[None, :], 0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def _scales(
    left,
    right,
    i,
    j,
    left_position,
    right_position,
    LEFT_GROUPS: tl.constexpr,
    RIGHT_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a_i . a_j for each pair of rows of a tile, computed once per pair of the (at most GROUPS) groups it touches."""
    left_first, right_first = i * TILE // ROWS, j * TILE // ROWS
    left_groups, right_groups = left_first + tl.arange(0, GROUPS), right_first + tl.arange(0, GROUPS)
    small = _products(
        left,
        right,
        left_groups.to(tl.int64) * POSITIONS + left_position,
        right_groups.to(tl.int64) * POSITIONS + right_position,
        left_groups < LEFT_GROUPS,
        right_groups < RIGHT_GROUPS,
        WIDTH,
        GROUPS,
        GROUPS,
        BLOCK,
        PRECISION,
    )
    if ROWS == 1:
        # A group is a row: GROUPS is TILE.
        return small
    # Rows and columns are repeated as their groups stand; the repeated matrix exists in registers only.
    within = tl.arange(0, TILE)
    row_group = (i * TILE + within) // ROWS - left_first
    column_group = (j * TILE + within) // ROWS - right_first
    tall = tl.gather(small, tl.broadcast_to(row_group[:, None], (TILE, GROUPS)), 0)
    return tl.gather(tall, tl.broadcast_to(column_group[None, :], (TILE, TILE)), 1)


@triton.jit
def gram_tile(
    gram,
    left_activations,
    left_cotangents,
    right_activations,
    right_cotangents,
    result,
    LEFT_GROUPS: tl.constexpr,
    RIGHT_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SCALED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (TILE, TILE) tile of result = gram + sum over positions t, u of (A_t A_u^T) * (D_t D_u^T).

    Program 0 counts tiles, row by row of the lower triangle if TRIANGLE; program 1 counts batch members.
    """
    left_total: tl.constexpr = LEFT_GROUPS * ROWS
    right_total: tl.constexpr = RIGHT_GROUPS * ROWS
    pid = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    if TRIANGLE:
        # pid = i (i + 1) / 2 + j with j <= i; the float root is off by at most one, which the two lines after it mend.
        i = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > pid, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= pid, i + 1, i)
        j = pid - i * (i + 1) // 2
    else:
        across: tl.constexpr = (right_total + TILE - 1) // TILE
        i = pid // across
        j = pid % across
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    row_kept, column_kept = rows < left_total, columns < right_total
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    place = member * left_total * right_total + wide_rows[:, None] * right_total + wide_columns[None, :]
    kept = row_kept[:, None] & column_kept[None, :]
    left_d = left_cotangents + member * left_total * POSITIONS * OUT
    right_d = right_cotangents + member * right_total * POSITIONS * OUT
    left_a = left_activations + member * LEFT_GROUPS * POSITIONS * IN
    right_a = right_activations + member * RIGHT_GROUPS * POSITIONS * IN
    total = tl.zeros((TILE, TILE), tl.float32)
    for pair in range(0, POSITIONS * POSITIONS):
        t = pair // POSITIONS
        u = pair % POSITIONS
        products = _products(
            left_d,
            right_d,
            wide_rows * POSITIONS + t,
            wide_columns * POSITIONS + u,
            row_kept,
            column_kept,
            OUT,
            TILE,
            TILE,
            BLOCK,
            PRECISION,
        )
        if SCALED:
            products *= _scales(
                left_a,
                right_a,
                i,
                j,
                t,
                u,
                LEFT_GROUPS,
                RIGHT_GROUPS,
                ROWS,
                POSITIONS,
                IN,
                TILE,
                GROUPS,
                BLOCK,
                PRECISION,
            )
        total += products
    tl.store(result + place, tl.load(gram + place, kept, 0.0) + total, kept)
