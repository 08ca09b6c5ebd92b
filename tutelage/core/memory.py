"""How much memory a step will take, how much is held, how much there is, and what running out of it looks like.

The estimate traces the model with tensors that have shapes and no contents: what autograd saves for backward is read
off exactly. The rest is arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.core import quantized
from tutelage.core.anatomy import Anatomy, anatomy
from tutelage.core.out import CHUNK

# Tensors of a chunk's size alive at once: logits, log-probabilities, and the gradients of both.
_LOGITS_COPIES = 4


def hold() -> None:
    """Let the C library keep what tensors free (up to a gibibyte) for the next step instead of handing it back.

    By default glibc decides that by what happens to lie where: the same step fetched again nothing or 8,000 pages, up to
    an eighth of its time. Does nothing where the C library is another one.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: from this size on (glibc takes no larger one) tensors are mapped alone
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def estimate(
    model: Any,
    *,
    batch_rows: int,
    length: int,
    optimizer_states_per_param: float = 2.0,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    chunk: int | None = None,
    quantize: bool = False,
    fused: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, int]:
    """Bytes one training step needs: `weights gradients optimizer activations logits total`.

    `model` is a transformers model (on the meta device, say) or its configuration; `dtype` that of weights, gradients
    and optimizer states (`optimizer_states_per_param` numbers for each trainable one), `autocast` that of the work if
    it differs. `batch_rows` × `length` is one micro-batch. `chunk` is the most numbers in a chunk of logits.
    With `quantize` the frozen linear layers hold four bits a weight; when backward is `fused` with the optimizer, only
    the largest gradient is there at once.

    Activations are what autograd saves in a forward traced on tensors without contents, plus what backward has in
    flight in the largest block; with `checkpointing`, the input of each block and one block's own. A model that
    cannot be traced (its work depends on contents) is taken by formula: inputs and outputs of its linear layers. So are
    blocks that tokens alone do not reach (a vision tower), at the rows' length.
    Not counted: teachers, methods' own state, the allocator's waste.
    """
    if not isinstance(model, nn.Module):
        model = _from_config(model)
    parts = anatomy(model)
    item = dtype.itemsize
    learned = [p.numel() for p in model.parameters() if p.requires_grad]
    trainable = sum(learned)
    saved, flight = _activations(model, parts, batch_rows, length, dtype, autocast, checkpointing, device)
    logits = _logits(model, parts, batch_rows * length, chunk, torch.device(device))
    weights = sum(p.numel() for p in model.parameters()) * item
    result = {
        "weights": weights - (quantized.saved(model, parts, item=item) if quantize else 0),
        "gradients": (max(learned, default=0) if fused else trainable) * item,
        "optimizer": int(trainable * optimizer_states_per_param * item),
        "activations": saved + max(0, flight - logits),  # the head is done when the blocks' backward begins
        "logits": logits,
    }
    result["total"] = sum(result.values())
    return result


def _from_config(config: Any) -> nn.Module:
    import transformers

    known = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    seq2seq, masked, causal = (
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForCausalLM,
    )
    autos = [seq2seq] if getattr(config, "is_encoder_decoder", False) else [masked, causal]
    if getattr(config, "is_decoder", False):
        autos = [causal]
    with torch.device("meta"):
        if known is not None:
            return known(config)
        for auto in autos:
            if type(config) in auto._model_mapping:
                return auto.from_config(config)
    raise UserError(f"no language model is known for a {type(config).__name__}")


def _logits(model: nn.Module, parts: Anatomy, tokens: int, chunk: int | None, device: torch.device) -> int:
    """A chunk's tensors in float32 and, when there are several chunks, the output matrix's gradient added up beside."""
    if parts.head is None or parts.vocab is None:
        return 0
    budget = chunk or CHUNK["cpu" if device.type == "cpu" else "cuda"]
    rows = min(tokens, max(1, budget // parts.vocab))
    matrix = model.get_submodule(parts.head).weight
    beside = matrix.numel() * 4 if rows < tokens and matrix.requires_grad else 0
    return rows * parts.vocab * 4 * _LOGITS_COPIES + beside


def _activations(
    model: nn.Module,
    parts: Anatomy,
    rows: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    checkpointing: bool,
    device: torch.device | str,
) -> tuple[int, int]:
    """Bytes kept until backward, and the most that backward has in flight besides in any one block."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints a page about every operator it cannot trace
    level = log.level
    log.setLevel(logging.CRITICAL)
    item = (autocast or dtype).itemsize
    learns = any(p.requires_grad for p in model.parameters())
    try:
        saved, block, reached = _traced(model, parts, rows, length, dtype, autocast, torch.device(device))
        for stack in parts.stacks if reached else ():
            if stack.name not in reached and any(p.requires_grad for p in stack.blocks.parameters()):
                saved += _by_formula(model, parts, rows, length, item, within=stack.name)[0]
        if not saved and learns:  # what learns lies outside of the trace: a projector before frozen blocks
            saved, block = _by_formula(model, parts, rows, length, item)
    except Exception:  # whatever a model's own code does that needs contents: the formula always answers
        saved, block = _by_formula(model, parts, rows, length, item)
    finally:
        log.setLevel(level)
    blocks = sum(len(stack.blocks) for stack in parts.stacks)
    if checkpointing:
        borders = blocks * rows * length * parts.hidden * item
        return borders + max(saved - blocks * block, 0), 2 * block
    return saved, block


def _traced(
    model: nn.Module,
    parts: Anatomy,
    rows: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    device: torch.device,
) -> tuple[int, int, set[str]]:
    """Bytes saved for backward by the whole backbone and by its largest block, and the stacks of blocks that ran."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        twin = _twin(model, dtype, device)
        parts = anatomy(twin)
        own = {p.untyped_storage()._cdata for p in twin.parameters()}
        kept: dict[int, Tensor] = {}  # held, so that no storage is used twice

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in own:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        sizes: list[int] = []
        reached: set[str] = set()
        for stack in parts.stacks:
            stack.blocks[0].register_forward_hook(lambda *_, name=stack.name: reached.add(name))
            for block in stack.blocks:
                block.register_forward_pre_hook(lambda *_: sizes.append(-_bytes(kept)))
                block.register_forward_hook(lambda *_: sizes.append(sizes.pop() + _bytes(kept)))
        tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if parts.kind == "seq2seq" else {})
        body = parts.root if parts.kind == "seq2seq" else parts.backbone
        cache = {"use_cache": False} if getattr(parts.root.config, "use_cache", None) is not None else {}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None),
        ):
            result = body(**inputs, **cache)
        del result
        return _bytes(kept), max(sizes, default=0), reached


def _bytes(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _twin(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same model with tensors that have no contents, in train mode; ties stay ties."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, quantized.Linear4bit):
            memo[id(module)] = quantized.stand_in(module, dtype=dtype, device=device)
    for parameter in model.parameters():
        kind = dtype if parameter.is_floating_point() else parameter.dtype
        empty = torch.empty(parameter.shape, dtype=kind, device=device)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo).train()


def _by_formula(
    model: nn.Module, parts: Anatomy, rows: int, length: int, item: int, *, within: str = ""
) -> tuple[int, int]:
    """Inputs and outputs of the linear layers, and four of the hidden width for each block's norms and residuals.

    Of all blocks, or of those `within` one stack.
    """
    width = 0
    for name in parts.linears:
        if parts.block_index(name) is not None and name.startswith(within):
            width += sum(quantized.sides(model.get_submodule(name)))
    for name in (n for n in parts.experts if n.startswith(within)):  # each token passes through a few experts
        chosen = getattr(parts.root.config, "num_experts_per_tok", 1) or 1
        width += sum(model.get_parameter(name).shape[-2:]) * chosen
    blocks = max(1, sum(len(stack.blocks) for stack in parts.stacks if stack.name.startswith(within)))
    width += 4 * parts.hidden * blocks
    saved = width * rows * length * item
    return saved, saved // blocks


def in_use(device: torch.device | str) -> tuple[int, int]:
    """Bytes that this process holds now, and the most it has held: tensors on a GPU, else resident memory. Microseconds."""
    device = torch.device(device)
    if device.type == "cuda":
        found = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
        return int(found["current"]), int(found["peak"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm", "rb") as handle:
            now = int(handle.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):  # another system: the peak is all it tells
        now = peak
    return now, max(now, peak)


def available(device: torch.device | str) -> int:
    """Bytes that can still be allocated: on a GPU also what torch holds unused, on a CPU also within a container."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = psutil.virtual_memory().available
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control groups here, or no limit ("max")
        return None


_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "ALLOC_FAILED")


def is_oom(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, says that memory ran out (of a GPU, the CPU, or Python)."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _SIGNS):
            return True
        cause = cause.__cause__
    return False
