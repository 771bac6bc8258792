"""The first and the last kernel of a decode step."""

import pytest
import torch

from mini_infer.kernels import decode_frame
from mini_infer.kernels.decode_frame import advance_rows, embed_rows
from mini_infer.kernels.penalties import MAX_COUNT

BLOCK_SIZE = 4


def make_rows(num_rows, device):
    """Token ids, lengths and tables of rows; the last row is padding."""
    generator = torch.Generator().manual_seed(num_rows)
    token_ids = torch.randint(0, 50, (num_rows,), generator=generator)
    seq_lens = torch.randint(1, 6 * BLOCK_SIZE + 1, (num_rows,), generator=generator).int()
    tables = torch.randint(1, 99, (num_rows, 6), generator=generator).int()
    token_ids[-1], seq_lens[-1], tables[-1] = 0, 0, 0
    active = torch.ones(num_rows, dtype=torch.int32)
    active[-1] = 0
    return [tensor.to(device) for tensor in (token_ids, seq_lens, tables, active)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "hidden_size"), [(1, 8), (3, 72), (5, 2050)])
def test_embed_rows(backend, num_rows, hidden_size, dtype):
    token_ids, seq_lens, tables, _ = make_rows(num_rows, backend.device)
    embedding = torch.randn(50, hidden_size + 6, device=backend.device).to(dtype)[:, 3 : hidden_size + 3]
    count_rows = torch.tensor([3, -1, 0, -1, -1][:num_rows], dtype=torch.int32, device=backend.device)
    counts = torch.randint(0, 9, (4, 50 + 6), device=backend.device).short()[:, :50]
    counts[0, token_ids[2 % num_rows]] = 2 * MAX_COUNT + 1
    before = counts.clone()
    run = backend.pick(embed_rows, decode_frame._launch_embed_rows)
    hidden, positions, slots = run(token_ids, seq_lens, tables, embedding, BLOCK_SIZE, count_rows, counts)
    before[3, token_ids[0]] += 2  # that of row 2 is as high as it goes
    assert torch.equal(counts, before)
    assert torch.equal(hidden[:-1], embedding[token_ids[:-1]])
    assert not hidden[-1].any(), "a padded row's hidden state is zeros"
    for row, (length, table) in enumerate(zip(seq_lens.tolist(), tables.tolist(), strict=True)):
        position = max(length - 1, 0)
        block, offset = divmod(position, BLOCK_SIZE)
        assert positions[row] == position
        assert slots[row] == table[block] * BLOCK_SIZE + offset


@pytest.mark.parametrize("num_rows", [1, 3, 130])
def test_advance_rows(backend, num_rows):
    token_ids, seq_lens, _, active = make_rows(num_rows, backend.device)
    before = seq_lens.tolist()
    sampled = torch.arange(100, 100 + num_rows, device=backend.device)
    logprobs = -torch.arange(num_rows, device=backend.device).float() / 7
    run = backend.pick(advance_rows, decode_frame._launch_advance_rows)
    packed = run(token_ids, seq_lens, active, sampled, logprobs)
    assert token_ids.tolist() == [*range(100, 100 + num_rows - 1), 0]
    assert seq_lens.tolist() == [length + 1 for length in before[:-1]] + [0]
    assert packed.dtype == torch.int32
    assert packed[:, 0].tolist() == sampled.tolist()
    assert torch.equal(packed[:, 1].contiguous().view(torch.float32), logprobs)


def test_bad_arguments():
    token_ids, seq_lens, tables, active = make_rows(3, "cpu")
    embedding, logprobs = torch.zeros(50, 8), torch.zeros(3)
    counted = active - 1, torch.zeros(2, 50, dtype=torch.int16)
    with pytest.raises(ValueError, match="token_ids must be int64"):
        embed_rows(token_ids.int(), seq_lens, tables, embedding, BLOCK_SIZE, *counted)
    with pytest.raises(ValueError, match=r"seq_lens must be int32 \[3\]"):
        embed_rows(token_ids, seq_lens[:2], tables, embedding, BLOCK_SIZE, *counted)
    with pytest.raises(ValueError, match=r"block_tables must be int32 \[3, max_blocks\]"):
        embed_rows(token_ids, seq_lens, tables[:2], embedding, BLOCK_SIZE, *counted)
    with pytest.raises(ValueError, match="dense"):
        embed_rows(token_ids, seq_lens, tables, embedding.t(), BLOCK_SIZE, *counted)
    with pytest.raises(ValueError, match=r"count_rows must be int32 \[3\]"):
        embed_rows(token_ids, seq_lens, tables, embedding, BLOCK_SIZE, active[:2], counted[1])
    with pytest.raises(ValueError, match="token_counts must be int16"):
        embed_rows(token_ids, seq_lens, tables, embedding, BLOCK_SIZE, active, counted[1].int())
    with pytest.raises(ValueError, match="active must be"):
        advance_rows(token_ids, seq_lens, active.long(), token_ids, logprobs)
    with pytest.raises(ValueError, match="logprobs must be"):
        advance_rows(token_ids, seq_lens, active, token_ids, logprobs.double())


def test_opcheck(device):
    token_ids, seq_lens, tables, active = make_rows(3, device)
    embedding = torch.randn(50, 8, device=device)
    counts = torch.zeros(2, 50, dtype=torch.int16, device=device)
    torch.library.opcheck(
        torch.ops.mini_infer.embed_rows.default,
        (token_ids, seq_lens, tables, embedding, BLOCK_SIZE, active - 1, counts),
    )
    logprobs = torch.zeros(3, device=device)
    torch.library.opcheck(
        torch.ops.mini_infer.advance_rows.default, (token_ids, seq_lens, active, token_ids + 1, logprobs)
    )
