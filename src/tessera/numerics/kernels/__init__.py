"""Kernels: the arithmetic of `docs/numerics.md` on plain tensors, once a backend.

`reference` states the law in slow, plain code; `torch` is vectorised PyTorch, and runs wherever torch does.
Every backend is a module with the same three functions; native ones slot in beside them without a caller noticing.

    quantise(x, tile_rows, tile_columns, row_segment, column_segment, offsets, format, scale_mode, rounding)
        x [R, C] float32 or bfloat16 -> codes uint8 [R, C] (E5M6: packed, [R, ceil(C / 2) * 3]),
        scales float32 [row tiles, column tiles] (see tiles.scale_shape), nonfinite int64 [] (elements that were
        NaN or infinite; they become the format's NaN code).
        scale_mode "power_of_two" | "float32"; rounding "nearest" | "toward_zero" (an ablation).
        Tiles: extents of 0 mean whole; with offsets int64 [G + 1] tiles of height 128 restart at each group.

    dequantise(codes, scales, tile_rows, tile_columns, row_segment, column_segment, offsets, format, columns)
        -> float32 [R, columns]: fl(code * scale).

    matmul(kind, a_codes, a_scales, a_tile_rows, a_tile_columns, a_format,
           b_codes, b_scales, b_tile_rows, b_tile_columns, b_format,
           segment, offsets, accumulation, interval, out_dtype)
        kind "fprop": A = X [T, K], B = W [G * N, K]        -> Y  [T, N]: y[t] = sum_k x[t, k] w[g(t), :, k]
        kind "dgrad": A = dY [T, N], B = W [G * N, K]       -> dX [T, K]: contraction over n, same codes as fprop
        kind "wgrad": A = dY [T, N], B = X [T, K]           -> dW [G * N, K]: contraction over the tokens of a group
        offsets int64 [G + 1] or None (G = 1): rows offsets[g] .. offsets[g + 1] of A (and of X in wgrad) belong to
        group g; tiles 128 rows high restart with them. `segment`: tiles of W's rows, and so of dY's columns in dgrad
        and wgrad, restart every `segment` (0: never; always N at least when G > 1).
        accumulation "float32": a float32 sum for each block of 128 of the contraction, y = fma(s_a * s_b, p, y),
        blocks in order; where a scale varies inside a block (row tiles read along their other direction), the sum
        is over decoded values. "hopper": the tensor-core model, promoted every `interval` elements.
        "hopper_unpromoted": the same, never promoted; scales must be constant along the contraction.
        out_dtype float32 or bfloat16 (rounded once, at the end).
"""
