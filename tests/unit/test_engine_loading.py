"""What is wrong with a model directory or an option is told before anything is served, with the value and a remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from engine.testing import ARCHITECTURES, make_tiny_model  # noqa: E402
from engine.transformers import TransformersOptions, create, loading  # noqa: E402
from engine.transformers.fingerprint import fingerprint  # noqa: E402
from splitwise_sched.errors import ConfigError  # noqa: E402
from splitwise_sched.tokenizer import Tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model_dir(source: Path, tmp_path: Path) -> Path:
    """A copy that the test may break."""
    return shutil.copytree(source, tmp_path / "model")


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = safetensors_torch.load_file(path / "model.safetensors")
    change(weights)
    safetensors_torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def options(path: Path | str, **changes: Any) -> TransformersOptions:
    return TransformersOptions(model=str(path), **{"num_blocks": 8, "num_threads": 1, **changes})


def refusal(path: Path | str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        create(options(path, **changes))
    return str(caught.value)


def test_directory_that_is_not_there_is_named() -> None:
    assert "'/no/such/model' does not exist" in refusal("/no/such/model")
    assert "'./no-such-model' does not exist" in refusal("./no-such-model")


def test_hub_id_that_cannot_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "could not be fetched from the hub" in refusal("nobody/no-such-model")
    assert "could not be fetched from the hub" in refusal("not a name!")


def test_file_in_place_of_a_directory_is_told(model_dir: Path) -> None:
    assert "is a file: give the directory" in refusal(model_dir / "config.json")


def test_directory_without_a_configuration_is_told(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_unreadable_configuration_is_told(model_dir: Path, text: str) -> None:
    (model_dir / "config.json").write_text(text)
    assert "config.json" in refusal(model_dir)


@pytest.mark.parametrize("architectures", [["MambaForCausalLM"], [], None, "LlamaForCausalLM"])
def test_unknown_architecture_is_named_with_those_that_are_known(model_dir: Path, architectures: Any) -> None:
    edit_config(model_dir, architectures=architectures)
    message = refusal(model_dir)
    assert "is not supported" in message and "LlamaForCausalLM" in message and "Qwen3MoeForCausalLM" in message
    if architectures == ["MambaForCausalLM"]:
        assert "MambaForCausalLM" in message


def test_every_architecture_that_is_supported_has_a_tiny_model_that_is_compared_with_generate(tmp_path: Path) -> None:
    made = set()
    for arch in ARCHITECTURES:
        path = make_tiny_model(arch, tmp_path / arch)
        made.update(json.loads((path / "config.json").read_text())["architectures"])
    assert made == set(loading.ARCHITECTURES)


def test_missing_weights_are_told(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    assert "has no weights (model.safetensors): download" in refusal(model_dir)
    (model_dir / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pickled weights are not loaded" in refusal(model_dir)


def test_missing_shard_is_named(model_dir: Path) -> None:
    (model_dir / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    assert "lacks the weights model-00002-of-00002.safetensors" in refusal(model_dir)


def test_weights_that_lack_a_tensor_are_told(model_dir: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(model_dir, lambda weights: weights.pop(name))
    message = refusal(model_dir)
    assert "lack 1 tensors" in message and name in message


def test_weights_that_are_cut_off_are_told(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be loaded" in refusal(model_dir)


def test_weights_of_another_shape_are_told(model_dir: Path) -> None:
    edit_config(model_dir, intermediate_size=384)
    assert "cannot be loaded" in refusal(model_dir)


def test_tokenizer_of_another_model_is_told(model_dir: Path) -> None:
    edit_config(model_dir, vocab_size=1000)
    message = refusal(model_dir)
    assert "do not belong together" in message and "1024 tokens" in message and "1000 rows" in message


def test_missing_tokenizer_is_told(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(model_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model is ''"),
        ({"dtype": "int4"}, "dtype is 'int4': it must be one of auto, float32"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 4, "kv_memory_bytes": 4}, "both given"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "at least max_num_seqs"),
    ],
)
def test_option_that_cannot_work_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersOptions(**{"model": "x", **changes})


def test_device_that_is_not_there_is_told(model_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no CUDA device" in refusal(model_dir, device="cuda")


def test_pool_larger_than_the_host_s_memory_is_told(model_dir: Path) -> None:
    message = refusal(model_dir, num_blocks=2_000_000_000)
    assert "2000000000 blocks" in message and "kv_memory_bytes" in message


def test_length_beyond_pool_or_model_is_told(model_dir: Path) -> None:
    assert "the KV pool of 8 blocks holds 128 tokens" in refusal(model_dir, max_model_len=129)
    assert "was made for 2048" in refusal(model_dir, max_model_len=2049, num_blocks=1000)


def test_length_is_what_model_and_pool_allow(model_dir: Path) -> None:
    for num_blocks, expected in ((8, 128), (1000, 2048)):
        engine = create(options(model_dir, num_blocks=num_blocks))
        assert engine.spec.max_model_len == expected
        engine.close()


def test_model_whose_rotation_changes_with_the_length_is_held_below_the_change(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 256,
    }
    path = make_tiny_model("phi3", tmp_path / "phi3", rope_parameters=rope, original_max_position_embeddings=256)
    engine = create(options(path, num_blocks=100))
    assert engine.spec.max_model_len == 256
    engine.close()


def test_pool_size_follows_the_memory_that_is_given(model_dir: Path) -> None:
    engine = create(options(model_dir, num_blocks=None, kv_memory_bytes=10 << 20))
    layout = engine.kv_layout
    # 4 layers, K and V, 16 tokens, 2 heads of 32 float32 numbers.
    assert layout.block_bytes == 4 * 2 * 16 * 2 * 32 * 4
    assert layout.num_blocks == (10 << 20) // layout.block_bytes == engine.spec.num_blocks
    assert engine.kv_pools[0].layout == layout
    engine.close()


def test_dtype_can_be_chosen(model_dir: Path) -> None:
    engine = create(options(model_dir, dtype="bfloat16"))
    assert engine.kv_layout.dtype == "bfloat16"
    engine.close()


def test_fingerprint_is_that_of_configuration_and_weights(model_dir: Path, source: Path) -> None:
    original = fingerprint(source)
    assert len(original) == 32
    edit_config(model_dir, transformers_version="0.0", _name_or_path="elsewhere", dtype="bfloat16")
    assert fingerprint(model_dir) == original
    edit_config(model_dir, rms_norm_eps=1e-3)
    assert fingerprint(model_dir) != original


def test_fingerprint_sees_a_change_of_any_matrix(model_dir: Path, source: Path) -> None:
    def change(weights: dict[str, Any]) -> None:
        weights["model.layers.2.self_attn.k_proj.weight"] += 1e-4

    edit_weights(model_dir, change)
    assert fingerprint(model_dir) != fingerprint(source)


def test_fingerprint_does_not_depend_on_how_weights_are_sharded(model_dir: Path, source: Path) -> None:
    weights = safetensors_torch.load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        file = model_dir / f"model-{number}.safetensors"
        safetensors_torch.save_file({name: weights[name] for name in part}, file)
    assert fingerprint(model_dir) == fingerprint(source)


def test_fingerprint_of_a_file_that_is_no_safetensors_file_is_refused(model_dir: Path) -> None:
    for data in (b"", b"\xff" * 64, (20).to_bytes(8, "little") + b"not json at all ...."):
        (model_dir / "model.safetensors").write_bytes(data)
        with pytest.raises(ConfigError, match="safetensors"):
            fingerprint(model_dir)


def test_importing_the_engine_package_does_not_import_torch() -> None:
    program = "import sys, engine.port, engine.transformers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_missing_extra_is_told_with_the_command_that_brings_it() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from engine.transformers import TransformersOptions, create\n"
        "from splitwise_sched.errors import ConfigError\n"
        "try:\n    create(TransformersOptions(model='x'))\n"
        "except ConfigError as exc:\n    sys.exit('pip install' not in str(exc))\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_tiny_model_is_the_same_every_time_and_talks(source: Path, tmp_path: Path) -> None:
    again = make_tiny_model("llama", tmp_path / "again")
    assert fingerprint(again) == fingerprint(source)
    assert fingerprint(make_tiny_model("llama", tmp_path / "other", seed=1)) != fingerprint(source)
    tokenizer = Tokenizer.from_pretrained_dir(again)
    text = "def main(argv): return 'Ünïcode ☃'\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.render_chat([{"role": "user", "content": "hello"}]).endswith("<s>assistant\n")
    assert tokenizer.eos_token_ids == (2,)
