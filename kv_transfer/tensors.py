"""An engine's own tensors as the regions of a pool: where they are, and what their strides mean.

Nothing here imports torch: a tensor is anything that can say where its bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kv_transfer.errors import InvalidLayout
from kv_transfer.layout import ITEM_BYTES, KVLayout
from kv_transfer.placement import BLOCK, HEAD, LAYER, PLANE, TOKEN, Base, Placement

DIM = "dim"
AXIS_NAMES = (LAYER, PLANE, BLOCK, TOKEN, HEAD, DIM)


@dataclass(frozen=True, slots=True)
class TensorView:
    """Where one tensor is.

    Attributes:
        strides: in bytes.
        device: "cpu", or another one's name.
        storage: the same for all views of one allocation.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    device: str
    storage: int

    @property
    def end(self) -> int:
        return self.address + self.item_bytes + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class Memory:
    """One region: ``num_bytes`` at ``address`` of ``device``."""

    address: int
    num_bytes: int
    device: str


def look_at(tensor: Any) -> TensorView:
    """Where a torch tensor, a numpy array, or another array of the same protocols is.

    Raises:
        InvalidLayout: it is none, or may not be written.
    """
    if hasattr(tensor, "data_ptr") and hasattr(tensor, "element_size"):
        item = int(tensor.element_size())
        return TensorView(
            address=int(tensor.data_ptr()),
            shape=tuple(int(n) for n in tensor.shape),
            strides=tuple(int(s) * item for s in tensor.stride()),
            item_bytes=item,
            device=str(tensor.device),
            storage=int(tensor.untyped_storage().data_ptr()),
        )
    interface = getattr(tensor, "__array_interface__", None)
    if not isinstance(interface, Mapping):
        raise InvalidLayout("placement", f"of a {type(tensor).__name__}: give torch tensors or numpy arrays")
    address, read_only = interface["data"]
    if read_only:
        raise InvalidLayout("placement", "of a read-only array: KV must be written into it")
    return TensorView(
        address=int(address),
        shape=tuple(tensor.shape),
        strides=tuple(tensor.strides),
        item_bytes=int(tensor.itemsize),
        device="cpu",
        storage=_root(tensor),
    )


def place_tensors(
    layout: KVLayout, tensors: Sequence[Any], names: Sequence[str]
) -> tuple[KVLayout, tuple[Memory, ...]]:
    """The layout with the placement that tensors have, and their memory by region.

    Args:
        layout: what the blocks mean; ``num_blocks`` and all others must be what the tensors have.
        tensors: one for each layer of this rank, or for each (layer, plane): K of the first layer, V of the first
            layer, K of the second ...; a single one, if it has both axes. All of one kind.
        names: of the dimensions of each tensor: out of layer, plane, block, token, head, dim. One that is not there is
            taken for 1. Memory order does not matter, except that what is not an axis of the layout must be contiguous.
    Raises:
        InvalidLayout: the tensors are not what the layout says; names the field.
    """
    views = [look_at(tensor) for tensor in tensors]
    if len(set(names)) != len(names) or not {BLOCK, DIM} <= set(names) <= set(AXIS_NAMES):
        raise InvalidLayout(
            "placement", f"has dimensions {', '.join(names)}: name block, dim and any of {', '.join(AXIS_NAMES)}, once"
        )
    per_layer = 1 if PLANE in names else layout.kv_planes
    expected = (1 if LAYER in names else layout.num_rank_layers) * per_layer
    if len(views) != expected:
        raise InvalidLayout(
            "num_layers", f"and kv_planes ask for {expected} tensors of {', '.join(names)}, not {len(views)}"
        )
    if len({view.device for view in views}) != 1:
        raise InvalidLayout("placement", "is on several devices: a rank's pool is on one")
    starts, sizes = _regions(views)
    bases, inner = [], set()
    for layer in range(layout.num_rank_layers):
        for plane in range(layout.kv_planes):
            index = 0 if LAYER in names else layer * per_layer
            view = views[index + (0 if PLANE in names else plane)]
            stride = _strides(layout, layer, view, names)
            region = starts[view.storage][0]
            offset = view.address - starts[view.storage][1]
            offset += layer * stride.get(LAYER, 0) + plane * stride.get(PLANE, 0)
            bases.append(Base(region, offset, stride[BLOCK]))
            inner.add((stride.get(TOKEN, 0), stride.get(HEAD, 0)))
    if len(inner) != 1:
        raise InvalidLayout("placement", "has tensors of different strides: those of tokens and heads must be the same")
    token_stride, head_stride = inner.pop()
    placement = Placement(
        region_bytes=tuple(size.num_bytes for size in sizes),
        bases=tuple(bases),
        token_stride=token_stride if layout.has_token_axis else 0,
        head_stride=head_stride if layout.has_head_axis else 0,
    )
    return replace(layout, placement=placement), tuple(sizes)


def _regions(views: Sequence[TensorView]) -> tuple[dict[int, tuple[int, int]], list[Memory]]:
    """By storage: number and address of its region; and the regions. Views of one allocation share one."""
    starts: dict[int, tuple[int, int]] = {}
    ends: dict[int, int] = {}
    for view in views:
        number, address = starts.get(view.storage, (len(starts), view.address))
        starts[view.storage] = number, min(address, view.address)
        ends[view.storage] = max(ends.get(view.storage, 0), view.end)
    device = views[0].device
    return starts, [Memory(address, ends[key] - address, device) for key, (_, address) in starts.items()]


def _strides(layout: KVLayout, layer: int, view: TensorView, names: Sequence[str]) -> dict[str, int]:
    """By axis, in bytes; sizes are checked."""
    if len(view.shape) != len(names):
        raise InvalidLayout("placement", f"of a tensor of shape {view.shape}: {len(names)} dimensions are named")
    opaque = layout.opaque_bytes[layout.first_layer + layer] if layout.opaque_bytes else 0
    if view.item_bytes != ITEM_BYTES[layout.dtype] and not opaque:
        raise InvalidLayout("dtype", f"is {layout.dtype!r}: the tensors have items of {view.item_bytes} bytes")
    wanted = {
        LAYER: ("num_layers", layout.num_rank_layers),
        PLANE: ("kv_planes", layout.kv_planes),
        BLOCK: ("num_blocks", layout.num_blocks),
        TOKEN: ("block_size", layout.block_size),
        HEAD: ("num_kv_heads", layout.num_rank_heads),
        DIM: ("head_dim", layout.head_dim),
    }
    if opaque:
        wanted = {**wanted, TOKEN: ("block_size", 1), HEAD: ("num_kv_heads", 1)}
        wanted[DIM] = ("opaque_bytes", opaque // view.item_bytes)
    sizes = dict(zip(names, view.shape, strict=True))
    for name, (field, count) in wanted.items():
        if name in (LAYER, PLANE) and name not in sizes:
            continue
        if sizes.get(name, 1) != count:
            raise InvalidLayout(
                field, f"makes {count} for {name}: the tensor of shape {view.shape} has {sizes.get(name, 1)}"
            )
    strides = dict(zip(names, view.strides, strict=True))
    run = {DIM}
    run |= set() if layout.has_token_axis else {TOKEN}
    run |= set() if layout.has_head_axis else {HEAD}
    inside = sorted((strides[name], sizes[name]) for name in run & set(names) if sizes[name] > 1)
    extent = view.item_bytes
    for stride, count in inside:
        if stride != extent:
            raise InvalidLayout(
                "axes",
                f"is {layout.axes!r}: what it leaves out must be contiguous, with dim; strides are {view.strides}",
            )
        extent *= count
    return strides


def _root(array: Any) -> int:
    """Identity of the array that owns an array's memory."""
    while getattr(array, "base", None) is not None and hasattr(array.base, "__array_interface__"):
        array = array.base
    return id(array)
