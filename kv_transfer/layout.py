"""What one rank's KV pool looks like, and whether two pools can exchange blocks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

from kv_transfer.errors import InvalidLayout, LayoutMismatch
from kv_transfer.placement import PACKINGS, Placement, Shape, check_placement, packed

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
AXES = ("token+head", "token", "head", "none")
MAX_NAME_CHARS = 256
MAX_BLOCKS = 2**31 - 1
MAX_POOL_BYTES = 2**46
MAX_RANKS = 4096
# Tokens of a pool: each must have a number of 32 bits, as the blocks of two sizes may have no larger unit in common.
MAX_POOL_TOKENS = 2**32 - 1

_LIMITS: Mapping[str, int] = {
    "num_layers": 4096,
    "num_kv_heads": 65536,
    "head_dim": 65536,
    "block_size": 65536,
    "num_blocks": MAX_BLOCKS,
    "tp_size": 4096,
    "kv_planes": 2,
}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of one rank's pool: a block holds [token][KV head of this rank][head_dim] for each layer and plane.

    Checked on construction (InvalidLayout names the field). With ``tp_size`` above ``num_kv_heads`` every head is
    held by ``tp_size / num_kv_heads`` neighbouring ranks. Ranks of an instance are numbered stage by stage.

    Attributes:
        engine: whose KV this is; engines do not share numerics or rotation, so it must be equal for a pair.
        model: fingerprint of configuration and weights.
        num_layers: of the whole model, over all stages.
        num_kv_heads: of the whole model, over all ranks; 1 for MLA, whose latent is one head that every rank holds.
        head_dim: width of K (and of V, padded to the same) in the pool.
        block_size: tokens.
        num_blocks: of this rank's pool; not part of compatibility.
        packing: order in which a dense pool of one region holds its axes; without meaning beside a ``placement``.
        kv_planes: 2 for K and V, 1 where both are one tensor (MLA, or K and V side by side in one head).
        axes: which axes of a block can be told apart by strides. What cannot is opaque, and moves whole: without
            ``token`` block sizes must be equal, without ``head`` ranks must hold the same heads.
        opaque_format: name for how opaque bytes are packed; must be equal for a pair.
        opaque_bytes: of a block in each layer of the model, where it is not what the other numbers make it; for
            layers of different sizes. Needs ``axes`` "none" and one plane.
        pp_layers: layers that each pipeline stage holds; empty for one stage.
        placement: where everything is, for pools that are not dense or have several regions; None for ``packing``.
    """

    engine: str
    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    tp_size: int = 1
    tp_rank: int = 0
    packing: str = "block-major"
    kv_planes: int = 2
    axes: str = "token+head"
    opaque_format: str = "engine"
    opaque_bytes: tuple[int, ...] = ()
    pp_layers: tuple[int, ...] = ()
    pp_rank: int = 0
    placement: Placement | None = None

    def __post_init__(self) -> None:
        for name in ("engine", "model", "dtype", "packing", "opaque_format"):
            text = getattr(self, name)
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_NAME_CHARS or not text.isprintable():
                raise InvalidLayout(name, f"is {str(text)[:80]!r}: give 1 to {MAX_NAME_CHARS} printable characters")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise InvalidLayout(name, f"is {str(value)[:80]!r}: it must be a whole number from 1 to {limit}")
        for name, known in (("dtype", ITEM_BYTES), ("packing", PACKINGS), ("axes", AXES)):
            if getattr(self, name) not in known:
                raise InvalidLayout(name, f"is {str(getattr(self, name))[:80]!r}: known are {', '.join(known)}")
        self._check_stages()
        self._check_opaque()
        if self.num_ranks > MAX_RANKS:
            raise InvalidLayout("tp_size", f"and pp_layers make {self.num_ranks} ranks: the limit is {MAX_RANKS}")
        for name, count in (("tp_rank", self.tp_size), ("pp_rank", self.pp_size)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < count:
                raise InvalidLayout(name, f"is {str(value)[:80]!r}: it must be from 0 to {count - 1}")
        small, large = sorted((self.tp_size, self.num_kv_heads))
        if large % small:
            raise InvalidLayout(
                "tp_size", f"is {self.tp_size}: it must divide the {self.num_kv_heads} KV heads, or be a multiple"
            )
        if self.num_blocks * self.block_bytes > MAX_POOL_BYTES:
            raise InvalidLayout("num_blocks", f"makes a pool of more than {MAX_POOL_BYTES} bytes")
        if self.num_blocks * self.block_size > MAX_POOL_TOKENS:
            raise InvalidLayout("num_blocks", f"makes a pool of more than {MAX_POOL_TOKENS} tokens")
        if self.placement is not None:
            check_placement(self.placement, self.shape)

    def _check_stages(self) -> None:
        if not isinstance(self.pp_layers, tuple) or not all(type(n) is int and n > 0 for n in self.pp_layers):
            raise InvalidLayout("pp_layers", f"is {str(self.pp_layers)[:80]}: give the number of layers of each stage")
        if self.pp_layers and sum(self.pp_layers) != self.num_layers:
            raise InvalidLayout(
                "pp_layers", f"has {sum(self.pp_layers)} layers over all stages: num_layers is {self.num_layers}"
            )

    def _check_opaque(self) -> None:
        sizes = self.opaque_bytes
        if not isinstance(sizes, tuple) or not all(type(n) is int and 0 < n <= MAX_POOL_BYTES for n in sizes):
            raise InvalidLayout("opaque_bytes", f"is {str(sizes)[:80]}: give the bytes of a block in each layer")
        if sizes and (len(sizes) != self.num_layers or self.axes != "none" or self.kv_planes != 1):
            raise InvalidLayout(
                "opaque_bytes",
                f"names {len(sizes)} layers: it must name all {self.num_layers}, with axes 'none' and one plane",
            )

    @property
    def has_token_axis(self) -> bool:
        return self.axes in ("token", "token+head")

    @property
    def has_head_axis(self) -> bool:
        return self.axes in ("head", "token+head")

    @property
    def pp_size(self) -> int:
        return max(1, len(self.pp_layers))

    @property
    def rank(self) -> int:
        """Among all ranks of the instance."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def num_ranks(self) -> int:
        return self.pp_size * self.tp_size

    @property
    def num_rank_layers(self) -> int:
        """Layers that this rank holds."""
        return self.pp_layers[self.pp_rank] if self.pp_layers else self.num_layers

    @property
    def first_layer(self) -> int:
        """Model-wide index of this rank's first layer."""
        return sum(self.pp_layers[: self.pp_rank])

    @property
    def num_rank_heads(self) -> int:
        """KV heads that this rank holds."""
        return max(1, self.num_kv_heads // self.tp_size)

    @property
    def first_head(self) -> int:
        """Model-wide index of this rank's first KV head."""
        return self.tp_rank * self.num_kv_heads // self.tp_size

    @property
    def head_bytes(self) -> int:
        """One head of one plane, for one token."""
        return self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """All of this rank's heads of one plane, for one token."""
        return self.num_rank_heads * self.head_bytes

    @property
    def layer_block_bytes(self) -> int:
        """One block of one layer: K and V. Of the largest layer, where ``opaque_bytes`` makes them different."""
        return max(self.opaque_bytes) if self.opaque_bytes else self.kv_planes * self.block_size * self.row_bytes

    @property
    def block_bytes(self) -> int:
        """One block of all layers of this rank."""
        if self.opaque_bytes:
            return sum(self.opaque_bytes[self.first_layer : self.first_layer + self.num_rank_layers])
        return self.num_rank_layers * self.layer_block_bytes

    @property
    def pool_bytes(self) -> int:
        """Of all regions."""
        return self.num_blocks * self.block_bytes if self.placement is None else self.placement.num_bytes

    @property
    def shape(self) -> Shape:
        if self.opaque_bytes:
            runs = self.opaque_bytes[self.first_layer : self.first_layer + self.num_rank_layers]
        else:
            run = self.head_bytes
            run *= 1 if self.has_token_axis else self.block_size
            run *= 1 if self.has_head_axis else self.num_rank_heads
            runs = (run,) * self.num_rank_layers
        return Shape(
            num_blocks=self.num_blocks,
            num_planes=self.kv_planes,
            num_tokens=self.block_size if self.has_token_axis else 1,
            num_heads=self.num_rank_heads if self.has_head_axis else 1,
            run_bytes=runs,
        )

    def compatibility(self) -> dict[str, str]:
        """What must be equal for two pools to exchange blocks, in the order in which a mismatch is reported.

        Number and size of ranks, stages and pools may differ, and where the bytes lie; the block size too, where
        tokens can be told apart.
        """
        names = ["engine", "model", "dtype", "num_layers", "num_kv_heads", "head_dim", "kv_planes", "axes"]
        if not self.has_token_axis:
            names.append("block_size")
        if not self.has_head_axis and self.num_kv_heads > 1:
            names.append("tp_size")
        if self.axes != "token+head":
            names.append("opaque_format")
        if self.opaque_bytes:
            names.append("opaque_bytes")
        return {name: str(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types; ``from_dict`` reads them back."""
        data: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("opaque_bytes", "pp_layers"):
            data[name] = list(getattr(self, name))
        data["placement"] = None if self.placement is None else self.placement.to_list()
        return data

    @classmethod
    def from_dict(cls, data: object) -> KVLayout:
        """Read what ``to_dict`` wrote, from a source that is not trusted.

        Raises:
            InvalidLayout: a field is missing, unknown, of the wrong type or out of bounds.
        """
        if not isinstance(data, Mapping):
            raise InvalidLayout("record", f"is a {type(data).__name__}: it must be a mapping")
        names = {f.name for f in fields(cls)}
        for name in data:
            if name not in names:
                raise InvalidLayout(str(name)[:80], "is not a field of a KV layout of this version")
        for name in sorted(names):
            if name not in data:
                raise InvalidLayout(name, "is missing")
        values = {name: data[name] for name in names}
        for name in ("opaque_bytes", "pp_layers"):
            if not isinstance(values[name], list | tuple) or len(values[name]) > _LIMITS["num_layers"]:
                raise InvalidLayout(name, f"is {str(values[name])[:80]!r}: it must be a list of numbers")
            values[name] = tuple(values[name])
        if values["placement"] is not None:
            values["placement"] = Placement.from_list(values["placement"])
        return cls(**values)


@lru_cache(maxsize=1024)
def placement_of(layout: KVLayout) -> Placement:
    """Where the blocks of a rank lie, also when its layout gives only a ``packing``."""
    return layout.placement or packed(layout.shape, PACKINGS[layout.packing])


def check_compatible(mine: KVLayout, theirs: KVLayout) -> None:
    """Whether blocks of the two pools mean the same.

    Raises:
        LayoutMismatch: names the first field that differs, and both values.
    """
    other = theirs.compatibility()
    for name, value in mine.compatibility().items():
        if other.get(name) != value:
            raise LayoutMismatch(name, value, other.get(name, str(getattr(theirs, name))))
