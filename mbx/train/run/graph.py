"""A micro-batch's forward and backward pass as a CUDA graph: recorded once, replayed without the processor.

The step of an 8B model under adapters at 1 x 2048 tokens is 14,500 kernels, and launching them one by one leaves the
GPU idle half of the time. A graph replays the same kernels on the same addresses, so whatever a pass reads or writes
has to stay where it is: rows are copied into buffers of the graph's own, weights and gradient buffers are Megatron
Core's, which never move. The reduction over ranks and the optimizer's step stay outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from mbx.train.data.batch import Batch
from mbx.train.model.sight import SEEN

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel

Results = list[dict[str, torch.Tensor]]
#: Steps in front of the recording: kernels are compiled and chosen, the optimizer's state is made.
WARM_STEPS = 2
#: What a pass reads of a micro-batch, but for what is beside it below.
_READ = ("tokens", "labels", "mask", "positions", "axes", "here")
#: Examples of a packed micro-batch that a recording has room for, at least.
_EXAMPLES = 32


@contextlib.contextmanager
def one_stream() -> Iterator[None]:
    """A stream of this block's own for all GPU work: gradients are added on the stream on which their parameters were
    wrapped, and the default stream takes part in no recording."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Graph:
    """The passes of one micro-batch of `chunk`, which `run` makes through Megatron Core's schedule.

    `micro_batches` are in a step. Losses are what `run` says; gradients are in `chunk`'s buffers, reduced at the end.
    """

    def __init__(
        self, chunk: DistributedDataParallel, run: Callable[[Iterator[Batch]], Results], micro_batches: int
    ) -> None:
        from mbx.models.megatron.core.config import get_model_config

        self.chunk, self.config, self.run, self.micro_batches = chunk, get_model_config(chunk), run, micro_batches
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._examples = _EXAMPLES
        self._results: Results = []
        self._tokens: torch.Tensor | None = None
        self._reduction: dict[str, object] = {}

    def step(self, batches: Iterable[Batch]) -> Results:
        """Run a step's micro-batches; their losses, as the schedule tells them."""
        found, tokens = Results(), None
        for batch in batches:
            given = self._read(batch)
            if any(given[name].shape != buffer.shape for name, buffer in self._inputs.items()):
                self.close()  # more examples in a row than there is room for
            if self._graph is None:
                self._record(given)
            for name, buffer in self._inputs.items():
                buffer.copy_(given[name], non_blocking=True)
            assert self._graph is not None
            self._graph.replay()
            found += [{name: value.clone() for name, value in one.items()} for one in self._results]
            if self._tokens is not None:
                tokens = self._tokens.clone() if tokens is None else tokens + self._tokens
        assert self.config.finalize_model_grads_func is not None
        self.config.finalize_model_grads_func([self.chunk], tokens, **self._reduction)
        return found

    def close(self) -> None:
        """Let go of the graph and of the memory that its passes use."""
        self._graph, self._results, self._tokens = None, [], None

    def _read(self, batch: Batch) -> dict[str, torch.Tensor]:
        given = {n: v for n, v in batch.items() if v is not None and (n in _READ or n.startswith(SEEN))}
        if self.config.num_moe_experts:  # balance losses leave padding out, of which a micro-batch may have none
            padding = batch["padding"]
            given["padding"] = torch.zeros_like(given["tokens"], dtype=torch.bool) if padding is None else padding
        if (ends := batch["cu_seqlens"]) is not None:
            while self._examples < len(ends) - 1:
                self._examples *= 2
            given["cu_seqlens"] = with_empty(ends, self._examples)
        return given

    def _record(self, given: Mapping[str, torch.Tensor]) -> None:
        """Record the passes, which computes nothing: gradients are as they were."""
        from mbx.models.megatron.core.capture import recordable

        self._inputs = {name: value.clone() for name, value in given.items()}
        batch: Batch = dict.fromkeys(("padding", "owner", "attention_mask", "cu_seqlens", "axes")) | self._inputs
        # kernels are started for what may come: an example as long as all rows
        batch = {**batch, "longest": torch.tensor(given["tokens"].numel())}
        scaled = self.config.grad_scale_func

        def keep(_: object, tokens: torch.Tensor | None, **others: object) -> None:
            self._tokens, self._reduction = tokens, others

        def share(loss: torch.Tensor) -> torch.Tensor:  # the schedule divides by its own number, which is 1
            whole = scaled(loss) if scaled is not None else loss
            return whole if self.config.calculate_per_token_loss else whole / self.micro_batches

        graph = torch.cuda.CUDAGraph()
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(self.config, "finalize_model_grads_func", keep))
            stack.enter_context(patch.object(self.config, "grad_scale_func", share))
            stack.enter_context(recordable([self.chunk], self.config))
            # of this thread alone: the backward pass and the collectives have threads of their own
            stack.enter_context(
                torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local")
            )
            self._results = self.run(iter([batch]))
        self._graph = graph


def with_empty(ends: torch.Tensor, examples: int) -> torch.Tensor:
    """The ends of packed examples, [n + 1], as those of `examples`, [examples + 1]: the others hold no token."""
    return torch.cat((ends, ends[-1:].expand(examples + 1 - len(ends))))
