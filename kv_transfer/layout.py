"""What one TP rank's KV pool looks like, and whether two pools can exchange blocks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from kv_transfer.errors import InvalidLayout, LayoutMismatch

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
PACKINGS = ("block-major",)
MAX_NAME_CHARS = 256
MAX_BLOCKS = 2**31 - 1
MAX_POOL_BYTES = 2**46

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
    """The shape of one rank's pool: ``[num_blocks][layer][plane][token][KV head of this rank][head_dim]``, C order.

    Checked on construction (InvalidLayout names the field). With ``tp_size`` above ``num_kv_heads`` every head is
    held by ``tp_size / num_kv_heads`` neighbouring ranks.

    Attributes:
        engine: whose KV this is; engines do not share numerics or rotation, so it must be equal for a pair.
        model: fingerprint of configuration and weights.
        num_kv_heads: of the whole model, over all ranks; 1 for MLA, whose latent is one head that every rank holds.
        head_dim: width of K (and of V, padded to the same) in the pool.
        block_size: tokens.
        num_blocks: of this rank's pool; not part of compatibility.
        kv_planes: 2 for K and V, 1 where both are one tensor (MLA).
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

    def __post_init__(self) -> None:
        for name in ("engine", "model", "dtype", "packing"):
            text = getattr(self, name)
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_NAME_CHARS or not text.isprintable():
                raise InvalidLayout(name, f"is {str(text)[:80]!r}: give 1 to {MAX_NAME_CHARS} printable characters")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise InvalidLayout(name, f"is {str(value)[:80]!r}: it must be a whole number from 1 to {limit}")
        if type(self.tp_rank) is not int or not 0 <= self.tp_rank < self.tp_size:
            raise InvalidLayout("tp_rank", f"is {str(self.tp_rank)[:80]!r}: it must be from 0 to {self.tp_size - 1}")
        if self.dtype not in ITEM_BYTES:
            raise InvalidLayout("dtype", f"is {self.dtype!r}: known are {', '.join(ITEM_BYTES)}")
        if self.packing not in PACKINGS:
            raise InvalidLayout("packing", f"is {self.packing!r}: known are {', '.join(PACKINGS)}")
        small, large = sorted((self.tp_size, self.num_kv_heads))
        if large % small:
            raise InvalidLayout(
                "tp_size", f"is {self.tp_size}: it must divide the {self.num_kv_heads} KV heads, or be a multiple"
            )
        if self.pool_bytes > MAX_POOL_BYTES:
            raise InvalidLayout("num_blocks", f"makes a pool of {self.pool_bytes} bytes: more than {MAX_POOL_BYTES}")

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
    def rows_per_block(self) -> int:
        """(layer, plane, token) triples in a block."""
        return self.num_layers * self.kv_planes * self.block_size

    @property
    def layer_block_bytes(self) -> int:
        """One block of one layer: K and V."""
        return self.kv_planes * self.block_size * self.row_bytes

    @property
    def block_bytes(self) -> int:
        """One block of all layers: the contiguous run that moves."""
        return self.num_layers * self.layer_block_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def compatibility(self) -> dict[str, str]:
        """What must be equal for two pools to exchange blocks, in the order in which a mismatch is reported.

        TP sizes and pool sizes may differ.
        """
        names = (
            "engine",
            "model",
            "dtype",
            "num_layers",
            "num_kv_heads",
            "head_dim",
            "block_size",
            "packing",
            "kv_planes",
        )
        return {name: str(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, str | int]:
        """Plain JSON types; ``from_dict`` reads them back."""
        return asdict(self)

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
        return cls(**{name: data[name] for name in names})


def check_compatible(mine: KVLayout, theirs: KVLayout) -> None:
    """Whether blocks of the two pools mean the same.

    Raises:
        LayoutMismatch: names the first field that differs, and both values.
    """
    other = theirs.compatibility()
    for name, value in mine.compatibility().items():
        if other[name] != value:
            raise LayoutMismatch(name, value, other[name])
