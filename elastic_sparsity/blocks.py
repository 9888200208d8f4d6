"""Running a model block by block: record what each block is called with, replay it over cached hidden states.

Nothing here knows masks, adapters or losses. The arguments are captured whatever they are (attention masks, rotary
tables, per-layer variants as in Gemma), so no architecture needs code of its own. Letters: S samples, T tokens a
sample, D model width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.activations import Activations
from elastic_sparsity.errors import ShapeError

BlockCall = Callable[[Tensor], Tensor]
NewActivations = Callable[[Sequence[int], torch.dtype, torch.device], Activations]


def new_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Activations:
    """Activations as a plain tensor."""
    return torch.empty(*shape, dtype=dtype, device=device)


class _FirstBlockReached(Exception):
    """Stops the model's forward once the first block's input is known."""


def first_tensor(output: Any) -> Tensor:
    """A block's hidden states, whether it returns a tensor or a tuple that starts with it."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _pre_hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockRunner:
    """Calls single blocks of a model exactly as the model itself would.

    Args:
        model: causal LM, or its body (which spares the logits), in eval mode.
        blocks: its decoder blocks.
        token_ids_ST: calibration samples, all of one length.
        batch_size: samples a call.
        whole: opens a context in which the whole model can run; for a model that is not whole in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module] | nn.ModuleList,
        token_ids_ST: Tensor,
        batch_size: int,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if token_ids_ST.ndim != 2 or not token_ids_ST.numel():
            raise ShapeError(f"calibration samples: expected (samples, tokens), found {tuple(token_ids_ST.shape)}.")
        self.model = model
        self.blocks = blocks
        self.token_ids_ST = token_ids_ST
        self.batch_size = batch_size
        self.whole = whole
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def batches(self) -> Iterator[slice]:
        """Consecutive sample ranges that cover all samples."""
        for start in range(0, self.token_ids_ST.shape[0], self.batch_size):
            yield slice(start, min(start + self.batch_size, self.token_ids_ST.shape[0]))

    @torch.no_grad()
    def first_hidden(self, new: NewActivations = new_tensor) -> Activations:
        """(S, T, D) input of the first block, in what `new` makes for a shape (S, T, D), dtype and device."""
        result: Activations | None = None
        captured: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(args[0] if args else kwargs["hidden_states"])
            raise _FirstBlockReached

        with _pre_hooks([self.blocks[0]], stop):
            for batch in self.batches():
                with suppress(_FirstBlockReached):
                    self.model(self.token_ids_ST[batch], use_cache=False)
                hidden = captured.pop()
                if result is None:
                    result = new((self.token_ids_ST.shape[0], *hidden.shape[1:]), hidden.dtype, hidden.device)
                result[batch] = hidden
        assert result is not None
        return result

    @torch.no_grad()
    def _record(self, batch_size: int) -> None:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append((args[1:], rest))

        with self.whole(), _pre_hooks(self.blocks, record):
            rows = torch.arange(batch_size) % self.token_ids_ST.shape[0]
            self.model(self.token_ids_ST[rows], use_cache=False)
        if len(calls) != len(self.blocks):
            raise ShapeError(f"model ran {len(calls)} blocks, expected {len(self.blocks)}, each once and in order.")
        self._calls[batch_size] = calls

    def call(self, index: int) -> BlockCall:
        """A function from hidden states (B, T, D) to block `index`'s output, differentiable."""
        # Now, not inside the run: that one may be observed, and must not see another. Training draws whole batches,
        # with fewer samples too.
        for size in {self.batch_size, *(batch.stop - batch.start for batch in self.batches())}:
            if size not in self._calls:
                self._record(size)

        def run(hidden: Tensor) -> Tensor:
            if hidden.shape[0] not in self._calls:
                self._record(hidden.shape[0])
            args, kwargs = self._calls[hidden.shape[0]][index]
            return first_tensor(self.blocks[index](hidden, *args, **kwargs))

        return run

    @torch.no_grad()
    def map(self, call: BlockCall, hidden_STD: Activations, output: Activations | None = None) -> Activations:
        """`call` over all samples, batch by batch, into `output` (None = a new tensor like `hidden_STD`)."""
        if output is None:
            output = torch.empty_like(hidden_STD[:])
        for batch in self.batches():
            output[batch] = call(hidden_STD[batch]).to(output.dtype)
        return output


@contextmanager
def input_hooks(linears: dict[str, nn.Module], observe: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
    """Calls `observe(names, input)` for the linears' inputs; linears fed by the same tensor are reported together.

    Sharing is found at run time by tensor identity, so q, k and v cost one statistic without any table. A report is
    sent when the next different input arrives, and at the end.
    """
    pending: list[tuple[str, Tensor]] = []

    def flush() -> None:
        if pending:
            names = tuple(name for name, _ in pending)
            x = pending[0][1]
            pending.clear()
            observe(names, x)

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            # A name seen twice is a new batch, even if the allocator handed out the same tensor object.
            if pending and (pending[0][1] is not args[0] or name in (seen for seen, _ in pending)):
                flush()
            pending.append((name, args[0]))

        return hook

    handles = [linear.register_forward_pre_hook(hook_for(name)) for name, linear in linears.items()]
    try:
        yield
        flush()
    finally:
        for handle in handles:
            handle.remove()
