"""Conversions of whole models: bit for bit there and back, in bounded memory, and what is refused.

On two processes, with Megatron as the reader: conversion_cases.py.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_policy, weights
from launched import assert_held, case_names, launch
from safetensors.torch import load_file, save_file

from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.conversion import convert_hf_to_megatron, convert_megatron_to_hf, verify
from megatron_mmr1.backend.conversion_plan import plan_of
from megatron_mmr1.convert import family_of, read_config
from megatron_mmr1.convert.hf_files import HfWeights, write_hf_folder
from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl
from megatron_mmr1.parity.models import TINY_MODELS, build_tiny

pytestmark = pytest.mark.usefixtures("process_group")

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).with_name("conversion_cases.py")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in several files, as transformers writes them."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "sharded"
    shutil.copytree(tiny_model_dir, folder)
    (folder / SINGLE).unlink()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model_dir)
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def megatron_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a checkpoint. Read only: it is shared."""
    folder = tmp_path_factory.mktemp("megatron") / "tiny"
    convert_hf_to_megatron(tiny_model_dir, folder)
    return folder


@pytest.fixture
def hf(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    shutil.copytree(tiny_model_dir, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def megatron(megatron_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    shutil.copytree(megatron_dir, tmp_path / "megatron")
    return tmp_path / "megatron"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("model", ["tiny_model_dir", "tied_model_dir", "sharded_model_dir"])
def test_there_and_back_gives_every_file_byte_for_byte(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
):
    """Names, shards, index, tokenizer and config included."""
    source: Path = request.getfixturevalue(model)
    done = convert_hf_to_megatron(source, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert files_of(tmp_path / "hf") == files_of(source)
    assert not list(tmp_path.glob("*.partial"))
    num_bytes = sum(t.nbytes for f in source.glob("*.safetensors") for t in load_file(f).values())
    assert (done.num_bytes, done.skipped) == (num_bytes, ())
    checked = verify(tmp_path / "hf", tmp_path / "megatron")
    assert (checked.num_tensors, checked.num_bytes) == (done.num_tensors, num_bytes)
    assert checked.differing == ()


def test_bits_that_are_no_numbers_and_other_dtypes_survive(hf: Path, tmp_path: Path):
    """bfloat16 weights with NaNs of every kind, beside a float32 vision tower."""

    def fill(tensors: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if not name.startswith("visual."):
                bits = torch.randint(-(1 << 15), 1 << 15, tensor.shape, generator=generator)
                tensors[name] = bits.to(torch.int16).view(torch.bfloat16)

    rewrite(hf, fill)
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(hf)
    assert verify(hf, tmp_path / "megatron").differing == ()


def test_hugging_face_loads_the_result(tiny_model_dir: Path, megatron_dir: Path, tmp_path: Path):
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    convert_megatron_to_hf(megatron_dir, tmp_path / "hf")
    models = [
        Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
        for folder in (tiny_model_dir, tmp_path / "hf")
    ]
    tokens = torch.arange(8, 24).unsqueeze(0)
    with torch.no_grad():
        first, second = (model(input_ids=tokens).logits for model in models)
    assert torch.equal(first, second)
    AutoProcessor.from_pretrained(tmp_path / "hf")


def test_verify_names_what_differs(hf: Path, megatron: Path):
    names = ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight")

    def change(tensors: dict[str, Any]) -> None:
        for name in names:
            tensors[name].view(torch.int32)[-1, -1] ^= 1  # one bit

    rewrite(hf, change)
    assert sorted(verify(hf, megatron).differing) == sorted(names)


def test_a_training_checkpoint_converts_without_its_optimizer(tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(f"model:\n  path: {tiny_model_dir}\n")
    policy = make_policy(tiny_model_dir)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.mul_(1.25)
    Checkpoints(tmp_path, keep_last=1).save(7, policy, {}, is_best=False)
    convert_megatron_to_hf(tmp_path / "checkpoints" / "step_7", tmp_path / "hf")
    found, expected = load_file(tmp_path / "hf" / SINGLE), weights(policy)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_known_duplicates_are_left_out_and_reported(tied_model_dir: Path, tmp_path: Path):
    hf = tmp_path / "hf"
    shutil.copytree(tied_model_dir, hf)
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[frequencies] = torch.ones(4)

    rewrite(hf, add)
    report = convert_hf_to_megatron(hf, tmp_path / "megatron")
    assert report.skipped == ("lm_head.weight", frequencies)
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert load_file(tmp_path / "back" / SINGLE).keys() == HfWeights(tied_model_dir).tensors.keys()
    rewrite(hf, lambda tensors: tensors["lm_head.weight"].add_(1))
    # Other values are no duplicate: transformers doesn't tie them either.
    report = convert_hf_to_megatron(hf, tmp_path / "untied")
    assert report.skipped == (frequencies,)
    convert_megatron_to_hf(tmp_path / "untied", tmp_path / "untied_back")
    theirs, ours = (load_file(f / SINGLE) for f in (hf, tmp_path / "untied_back"))
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])


def cut(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1000)


def shorten_header(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", 40) + content[8:])


def claim_a_huge_header(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", 1 << 62) + content[8:])


def overlap_tensors(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [n for n in header if n.endswith("q_proj.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def only_a_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "nosuch"}))


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def into_shards(folder: Path) -> dict[str, str]:
    """Cut the file in two, by hand."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in ("0.safetensors", "1.safetensors"):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def missing_shard(folder: Path) -> None:
    into_shards(folder)
    (folder / "1.safetensors").unlink()


def ghost_in_index(folder: Path) -> None:
    weight_map = into_shards(folder) | {"model.ghost.weight": "1.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def left_out_of_index(folder: Path) -> None:
    weight_map = into_shards(folder)
    del weight_map["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def index_that_leads_out(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


def damaged_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def other_shape(folder: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(8, 8)}))


def missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.3.self_attn.v_proj.bias"))


def unknown_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))


def one_layer_in_another_dtype(folder: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))


def quantized(folder: Path) -> None:
    name = "model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


def sizes_of_another_model(folder: Path) -> None:
    change_config(folder, intermediate_size=512)


def more_layers_than_there_are(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors.*has \d+ bytes, but its header describes \d+; copy it again"),
        (shorten_header, r"model\.safetensors.*header cannot be read.*copy it again"),
        (claim_a_huge_header, r"model\.safetensors.*header would take.*copy it again"),
        (overlap_tensors, r"model\.safetensors.*starts at byte.*copy it again"),
        (only_a_pickle, r"holds neither model\.safetensors.*pickled weights are not read"),
        (no_config, r"--hf=.*has no model config \(config\.json\); copy it"),
        (unknown_type, r"config\.json: model_type='nosuch' has no conversion table; known"),
        (damaged_config, r"config\.json is not JSON .*copy it"),
        (missing_shard, r"lacks 1\.safetensors, which model\.safetensors\.index\.json names"),
        (ghost_in_index, r"names model\.ghost\.weight, which 1\.safetensors does not hold"),
        (left_out_of_index, r"safetensors holds model\.norm\.weight, which .* does not name"),
        (index_that_leads_out, r"weight_map names no files of its folder; copy"),
        (damaged_index, r"index\.json is no index of a model"),
        (other_shape, r"layers\.2\.mlp\.down_proj\.weight is of shape \(8, 8\), but config\.json"),
        (missing_tensor, r"has no tensor 'model\.layers\.3\.self_attn\.v_proj\.bias'"),
        (unknown_tensor, r"no conversion rule for model\.extra\.weight; remove"),
        (one_layer_in_another_dtype, r"down_proj\.weight is torch\.(bfloat16|float32).*one dtype"),
        (quantized, r"model\.norm\.weight is torch\.int8; give a model that is not quantized"),
        (sizes_of_another_model, r"mlp\.\w+_proj\.weight is of shape .* config\.json describes"),
        (more_layers_than_there_are, r"has no tensor 'model\.layers\.4"),
    ],
)
def test_a_bad_model_folder_is_refused_and_nothing_is_left(
    hf: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
):
    damage(hf)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_hf_to_megatron(hf, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def no_mark(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def other_backend(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))


def no_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def missing_data(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def cut_data(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 1000)


def zeros_in_data(folder: Path) -> None:
    size = (folder / "__0_0.distcp").stat().st_size
    (folder / "__0_0.distcp").write_bytes(bytes(size))


class RunsACommand:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 1",)


def command_in_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(RunsACommand()))


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def data_that_leads_out(folder: Path) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../megatron/" + place.relative_path

    change_metadata(folder, change)


def tensor_left_out(folder: Path) -> None:
    key = "language.decoder.layers.mlp.linear_fc2.weight"
    change_metadata(folder, lambda metadata: metadata.state_dict_metadata.pop(key))


def layer_left_out(folder: Path) -> None:
    key = "language.decoder.layers.mlp.linear_fc2.weight"
    change_metadata(folder, lambda metadata: metadata.state_dict_metadata[key].chunks.pop())


def unknown_parameter(folder: Path) -> None:
    def change(metadata: Any) -> None:
        known = metadata.state_dict_metadata
        known["language.extra"] = known["language.decoder.final_layernorm.weight"]
        known["language.extra"].chunks.clear()

    change_metadata(folder, change)


def another_models(folder: Path) -> None:
    change_config(folder / "hf", intermediate_size=512)


def layout_of_another_model(folder: Path) -> None:
    layout = json.loads((folder / "hf" / "hf_layout.json").read_text())
    layout["files"][SINGLE].append("model.extra")
    (folder / "hf" / "hf_layout.json").write_text(json.dumps(layout))


def layout_that_leads_out(folder: Path) -> None:
    layout = json.loads((folder / "hf" / "hf_layout.json").read_text())
    layout["files"]["../x.safetensors"] = layout["files"].pop(SINGLE)
    (folder / "hf" / "hf_layout.json").write_text(json.dumps(layout))


def no_template(folder: Path) -> None:
    shutil.rmtree(folder / "hf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_mark, r"no Megatron checkpoint, or a half-written one \(no metadata\.json\); give"),
        (other_backend, r"sharded_backend='zarr' is not read; save as"),
        (no_metadata, r"has no \.metadata: its writing was never finished"),
        (missing_data, r"lacks __0_0\.distcp, which its \.metadata names; complete the copy"),
        (cut_data, r"__0_0\.distcp has 1000 bytes, but \.metadata describes \d+.*copy it again"),
        (zeros_in_data, r"__0_0\.distcp: the part of \S+ at byte \d+ is damaged.*copy"),
        (command_in_metadata, r"\.metadata is not the metadata .* it names \w+\.system"),
        (data_that_leads_out, r"\.metadata is not the metadata .* it points to '\.\./megatron"),
        (tensor_left_out, r"has no tensor 'language\.decoder\.layers\.mlp\.linear_fc2\.weight'"),
        (layer_left_out, r"the parts of \S+linear_fc2\.weight do not cover it"),
        (unknown_parameter, r"has no language\.extra; give the folder of the checkpoint's own"),
        (another_models, r"linear_fc1\.weight is of shape .*config\.json.*--template"),
        (layout_of_another_model, r"names other tensors .* as model\.extra; give"),
        (layout_that_leads_out, r"layout\.json names no plain files"),
        (no_template, r"says nothing of its model .* give the Hugging Face folder .* --template"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_nothing_is_left(
    megatron: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
):
    damage(megatron)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_megatron_to_hf(megatron, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_half_written_folders_are_refused(megatron: Path, tmp_path: Path):
    for name in ("model.partial", "partial_step_3/megatron"):
        partial = tmp_path / name
        shutil.copytree(megatron, partial)
        with pytest.raises(ValueError, match="half-written"):
            convert_megatron_to_hf(partial, tmp_path / "out")


def test_a_folder_that_holds_something_is_never_written_over(
    hf: Path, megatron: Path, tmp_path: Path
):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    for convert, source in ((convert_hf_to_megatron, hf), (convert_megatron_to_hf, megatron)):
        for out in (taken, hf):
            with pytest.raises(ValueError, match="exists; nothing is written over"):
                convert(source, out)
    (tmp_path / "empty").mkdir()
    convert_hf_to_megatron(hf, tmp_path / "empty")
    assert (tmp_path / "empty" / ".metadata").is_file()


def test_an_exported_folder_is_cut_into_shards_as_it_is_written(
    tiny_model_dir: Path, tmp_path: Path
):
    expected = load_file(tiny_model_dir / SINGLE)
    write_hf_folder(tmp_path / "one", iter(expected.items()), tiny_model_dir)
    assert (tmp_path / "one" / SINGLE).is_file()
    write_hf_folder(tmp_path / "many", iter(expected.items()), tiny_model_dir, 1_000_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    for folder in ("one", "many"):
        found = HfWeights(tmp_path / folder)
        assert found.tensors.keys() == expected.keys()
        for file in (tmp_path / folder).glob("*.safetensors"):  # safetensors' own reader agrees
            for name, tensor in load_file(file).items():
                assert torch.equal(tensor, expected[name]) and torch.equal(found[name], tensor)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_family_goes_there_and_back_byte_for_byte(name: str, tmp_path: Path):
    """Every tensor once: neither direction takes a tensor that it doesn't know, or leaves one."""
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    build_tiny(name, hf)
    report = convert_hf_to_megatron(hf, megatron)
    assert report.num_tensors == len(HfWeights(hf).tensors) and not report.skipped
    assert verify(hf, megatron).differing == ()
    convert_megatron_to_hf(megatron, back)
    assert files_of(back) == files_of(hf)


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl_qwen2"])
def test_names_are_kept_as_the_files_spell_them(name: str, tmp_path: Path):
    """Files of another version of transformers, with its names."""
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    build_tiny(name, hf)
    (spelling,) = family_of(read_config(hf)).spellings
    tensors = load_file(hf / SINGLE)
    renamed = {spelling.in_files(n): t for n, t in tensors.items()}
    save_file(renamed, hf / SINGLE, metadata={"format": "pt"})
    convert_hf_to_megatron(hf, megatron)
    convert_megatron_to_hf(megatron, back)
    assert (back / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()
    policy = make_policy(hf)
    exported = dict(policy.named_tensors())
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[n], tensors[n]) for n in tensors)


def test_experts_lie_where_transformer_engines_layers_look_for_them(tmp_path: Path):
    """It fuses the norm before a dense MLP, and not the one before experts."""
    norms = {}
    for name in ("qwen3", "qwen3_moe"):
        build_tiny(name, tmp_path / name)
        plan = plan_of(tmp_path / name)
        norms[name] = {p.box.key for p in plan.parameters if "mlp" in p.name and "norm" in p.name}
    layer = "language.decoder.layers."
    assert norms == {
        "qwen3": {layer + "mlp.linear_fc1.layer_norm_weight"},
        "qwen3_moe": {layer + "pre_mlp_layernorm.weight"},
    }


@pytest.mark.parametrize("says", ["the model", "the decoder", "both, and the files differ"])
def test_ties_are_settled_by_the_files_as_transformers_does(says: str, tmp_path: Path):
    """InternVL's config is tied by default, its published models are not; Qwen3-VL's config has
    said it in one place or the other.
    """
    from transformers import AutoModelForImageTextToText

    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    is_tied = says != "both, and the files differ"
    build_tiny("qwen3_vl", hf, tied=is_tied)
    config = json.loads((hf / "config.json").read_text())
    config["tie_word_embeddings"] = says != "the decoder"
    config["text_config"]["tie_word_embeddings"] = says != "the model"
    (hf / "config.json").write_text(json.dumps(config))
    convert_hf_to_megatron(hf, megatron)
    convert_megatron_to_hf(megatron, back)
    assert files_of(back) == files_of(hf)
    policy = make_policy(hf)
    exported, in_file = dict(policy.named_tensors()), load_file(hf / SINGLE)
    assert exported.keys() == in_file.keys()
    assert ("lm_head.weight" in exported) != is_tied
    assert all(torch.equal(exported[n], in_file[n]) for n in in_file)
    if says != "the decoder":  # whose word transformers doesn't take
        theirs = AutoModelForImageTextToText.from_pretrained(hf)
        head = theirs.get_output_embeddings().weight
        assert (head is theirs.get_input_embeddings().weight) == is_tied


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_the_commands_convert_verify_and_say_what_is_wrong(hf: Path, tmp_path: Path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    done = run_tool("convert_hf_to_megatron.py", "--hf", hf, "--megatron", megatron, "--verify")
    assert done.returncode == 0, done.stderr
    assert "the same bit for bit: 81 tensors" in done.stdout
    done = run_tool("convert_megatron_to_hf.py", "--megatron", megatron, "--hf", back, "--verify")
    assert done.returncode == 0, done.stderr
    assert files_of(back) == files_of(hf)
    again = run_tool("convert_megatron_to_hf.py", "--megatron", megatron, "--hf", back)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: ") and "exists" in again.stderr


def measured(what: str, source: Path, out: Path) -> Any:
    tool = ("measure_conversion.py", "--megabytes", 400)
    done = run_tool(*tool, "--one", what, source, out)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_is_one_parameter_whatever_the_models_size(tmp_path: Path):
    """Anonymous memory in a process of its own, growth since the imports.

    The bound is the largest parameter, the buffer of one block (16 MiB), and 32 MiB for what
    Python, the allocator and the model without memory take; to compare takes twice that. The model
    is several times as large; the control, the whole model in memory, breaks the bound.
    """
    hf, out = tmp_path / "hf", tmp_path / "out"
    measured("make", tmp_path, hf)
    found = measured("memory", hf, out)
    bound = found["largest_bytes"] + (16 << 20) + (32 << 20)
    assert found["model_bytes"] > 3 * bound
    assert found["to_megatron"] <= bound, found
    assert found["to_hf"] <= bound, found
    assert found["verify"] <= 2 * bound, found
    assert found["whole_model"] > bound
    assert (out / "hf" / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one report a case, after all of them ran in one launch."""
    folder = tmp_path_factory.mktemp("conversion")
    for model, is_tied in (("untied", False), ("tied", True)):
        build_tiny_qwen2_5_vl(folder / model, tie_word_embeddings=is_tied)
    build_tiny("qwen3_moe", folder / "experts")
    for model in ("untied", "tied", "experts"):
        convert_hf_to_megatron(folder / model, folder / f"{model}_megatron")
    launch(CASES, folder, num_ranks=2)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", case_names(CASES))
def test_on_two_processes(reports: Path, case: str):
    assert_held(reports, case)
