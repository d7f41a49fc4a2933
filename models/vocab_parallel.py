"""The embedding and the head where each rank of a group holds some of the words and some positions of the sequences.

B sequences, S positions, s = S / P of one rank, T = B * S tokens, D model, V words, v of one rank, C of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels import native
from ..kernels.cross_entropy import chunk_tokens, head_loss, wide_dtype
from ..kernels.linear import linear
from ..parallel.collectives import all_reduce_max, all_reduce_sum
from ..parallel.tensor import gather_sequence, local_part, scatter_sequence

IGNORED = -100


class VocabParallel:
    """What a model does with its vocabulary over a tensor-parallel group. Rank p holds the rows p * ceil(V / P) and
    so on of the table, the last one fewer; all ranks are given the same tokens and targets.

    whole: every rank holds all positions of the sequences; there is no loss then.
    """

    def __init__(self, group: dist.ProcessGroup, words: int, whole: bool = False) -> None:
        self.group, self.words, self.whole = group, words, whole
        self.share = -(-words // group.size())
        self.first = group.rank() * self.share

    def look_up(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """x_BsD of all tokens (B, S): each rank looks up its words, and the sum goes to the positions' ranks."""
        weight_vD = local_part(weight_VD)
        own_BS, here_BS = self._here(tokens_BS, len(weight_vD))
        x_BSD = F.embedding(own_BS, weight_vD).where(here_BS[..., None], 0)
        return all_reduce_sum(x_BSD, self.group) if self.whole else scatter_sequence(x_BSD, self.group)

    def loss(self, x_BsD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """SUM of the cross entropy over the targets (B, S) at this rank's positions: the ranks' sum counts each once.

        The ranks compute the logits of all positions together, so they must scale their losses alike.
        """
        x_BSD = gather_sequence(x_BsD, self.group)
        return _Loss.apply(x_BSD.flatten(0, 1), local_part(weight_VD), targets_BS, self)

    @torch.no_grad()
    def logits(self, x_BsD: Tensor, weight_VD: Tensor, keep: int) -> Tensor:
        """Logits of the last `keep` positions (0: all), whole on every rank; no gradient."""
        weight_vD = local_part(weight_VD)
        x_BSD = (x_BsD if self.whole else gather_sequence(x_BsD, self.group))[:, -keep:]
        native_BvS = linear(x_BSD, weight_vD).mT if native.ready(x_BSD, weight_vD) else weight_vD @ x_BSD.mT
        logits_BvS = F.pad(native_BvS, (0, 0, 0, self.share - len(weight_vD)))
        return gather_sequence(logits_BvS, self.group)[:, : self.words].mT

    def loss_rows(self, targets_T: Tensor, own_T: Tensor) -> Callable[[Tensor, slice, bool], Tensor]:
        """What `head_loss` asks for: the loss of a chunk's tokens, and the gradient of its logits on this rank."""

        def run(logits_Cv: Tensor, rows: slice, grad: bool) -> Tensor:
            targets_C = targets_T[rows]
            counted_C = targets_C != IGNORED
            wide_Cv = logits_Cv.to(wide_dtype(logits_Cv))
            top_C = all_reduce_max(wide_Cv.amax(1), self.group)
            wide_Cv = wide_Cv - top_C[:, None]
            word_C, here_C = self._here(targets_C, logits_Cv.shape[1])
            hit_C = wide_Cv.gather(1, word_C[:, None])[:, 0].where(here_C, 0)
            wide_Cv.exp_()
            total_C, hit_C = all_reduce_sum(torch.stack([wide_Cv.sum(1), hit_C]), self.group)
            if grad:
                wide_Cv.div_(total_C[:, None])
                wide_Cv.scatter_add_(1, word_C[:, None], -here_C[:, None].to(wide_Cv.dtype))
                logits_Cv.copy_(wide_Cv.where(counted_C[:, None], 0))
            return (total_C.log() - hit_C).where(counted_C & own_T[rows], 0)

        return run

    def _here(self, ids: Tensor, words: int) -> tuple[Tensor, Tensor]:
        """Ids counted from this rank's first word, 0 for those of others, and which are this rank's."""
        own = ids - self.first
        here = (own >= 0) & (own < words)
        return own.where(here, 0), here


class _Loss(torch.autograd.Function):
    """As the head on one device, the forward pass makes both gradients of the SUM over all tokens."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_vD: Tensor, targets_BS: Tensor, vocabulary: VocabParallel) -> Tensor:
        ranks, rank = vocabulary.group.size(), vocabulary.group.rank()
        own_BS = torch.zeros_like(targets_BS, dtype=torch.bool)
        own_BS.chunk(ranks, 1)[rank].fill_(True)
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        # All ranks must cut their tokens into the same chunks, whatever their number of words.
        chunk = chunk_tokens(x_TD, vocabulary.share, 0)
        rows = vocabulary.loss_rows(targets_BS.flatten(), own_BS.flatten())
        loss, dx_TD, dw_vD = head_loss(x_TD, weight_vD, rows, chunk, need)
        ctx.need = need
        ctx.save_for_backward(dx_TD, dw_vD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = [made * grads[0] if need else None for made, need in zip(ctx.saved_tensors, ctx.need, strict=True)]
        return *given, None, None
