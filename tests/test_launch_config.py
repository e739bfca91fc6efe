"""An experiment for so many machines runs on no others; and presets on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from processes import Finished, Process

from megatron_mmr1 import cli
from megatron_mmr1.config.launch import check_launch, torchrun_line
from megatron_mmr1.config.schema import GrpoConfig, LaunchConfig, SftConfig

WHAT = ("megatron_mmr1.train", "mmr1_7b_vas_64xh100")


@pytest.mark.parametrize(
    ("launch", "world_size", "num_nodes"),
    [
        (LaunchConfig(8, 8), 64, 8),
        (LaunchConfig(1, 8), 8, 1),
        (LaunchConfig(None, 8), 16, 2),
        (LaunchConfig(2, None), 6, 2),
        (LaunchConfig(), 5, 3),
    ],
)
def test_a_launch_as_stated_is_taken(launch: LaunchConfig, world_size: int, num_nodes: int):
    check_launch(launch, world_size, num_nodes, *WHAT)


@pytest.mark.parametrize(
    ("launch", "world_size", "num_nodes", "found", "line"),
    [
        (LaunchConfig(8, 8), 8, 1, "8 processes on 1 node are running", "--nnodes 8 "),
        (LaunchConfig(8, 8), 64, 4, "64 processes on 4 nodes", "--nproc-per-node 8 "),
        (LaunchConfig(1, 8), 1, 1, "1 process on 1 node is running", "torchrun --standalone "),
        (LaunchConfig(1, 8), 4, 1, "4 processes on 1 node", "--nproc-per-node 8 "),
        (LaunchConfig(None, 8), 15, 2, "15 processes on 2 nodes", "--nnodes 2 "),
        (LaunchConfig(2, None), 4, 1, "4 processes on 1 node", "--nnodes 2 "),
    ],
)
def test_another_number_of_gpus_or_nodes_is_refused_with_the_line_to_start(
    launch: LaunchConfig, world_size: int, num_nodes: int, found: str, line: str
):
    with pytest.raises(ValueError) as caught:
        check_launch(launch, world_size, num_nodes, *WHAT)
    message = str(caught.value)
    assert message.startswith(f"launch.nodes={launch.nodes} and launch.gpus_per_node=")
    assert found in message and line in message
    assert "-m megatron_mmr1.train experiment=mmr1_7b_vas_64xh100`" in message
    assert "launch.nodes=null launch.gpus_per_node=null" in message


def test_a_number_below_1_is_refused():
    with pytest.raises(ValueError, match=r"^launch\.gpus_per_node=0 is too small; use 1 or more"):
        check_launch(LaunchConfig(1, 0), 8, 1, *WHAT)


def test_the_proposed_line_is_one_that_torchrun_takes_and_that_launches_what_is_stated():
    """torchrun's own parser reads it back."""
    from torch.distributed.run import parse_args

    for nodes, gpus in ((1, 8), (64, 8)):
        _, *arguments = torchrun_line(nodes, gpus, *WHAT).split()
        read = parse_args(arguments)
        # Without --nnodes torchrun's default is from 1 to 1.
        least, _, most = read.nnodes.partition(":")
        assert (int(least), int(most or least)) == (nodes, nodes)
        assert int(read.nproc_per_node) == gpus
        assert read.module and read.training_script == "megatron_mmr1.train"
        assert read.training_script_args == ["experiment=mmr1_7b_vas_64xh100"]
        assert read.standalone or (read.rdzv_backend, read.rdzv_id) == ("c10d", WHAT[1])


@pytest.mark.parametrize(
    ("module", "experiment"),
    [("train", "mmr1_7b_vas_64xh100"), ("sft", "mmr1_32b_sft_512xh100")],
)
def test_an_entry_point_refuses_before_it_looks_at_models_and_data(
    tmp_path: Path, module: str, experiment: str
):
    """None of them is there; the fault that is named is the launch."""
    arguments = [f"experiment={experiment}", f"output_dir={tmp_path}"]
    arguments += ["data.heldout=nowhere"] if module == "train" else []
    environment = {"RANK": "0", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
    program = Process(tmp_path / module, "-m", f"megatron_mmr1.{module}", *arguments, **environment)
    finished = program.wait()
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: launch.nodes=")
    assert "4 processes on 2 nodes are running" in finished.stderr
    knowingly = [*arguments, "launch.nodes=null", "launch.gpus_per_node=null"]
    program = Process(tmp_path / module, "-m", f"megatron_mmr1.{module}", *knowingly, **environment)
    finished = program.wait()
    assert finished.returncode == 2 and "launch." not in finished.stderr
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == []


def test_settings_are_looked_at_before_a_launch_as_the_run_would(tmp_path: Path):
    """Good ones pass, twice; a slip, another layout's fault and another run's folder don't."""
    (tmp_path / "model").mkdir()
    for name in ("data.parquet", "model/tokenizer.json", "model/model.safetensors"):
        (tmp_path / name).touch()
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    text = json.dumps({"text_config": sizes | {"intermediate_size": 128}})
    (tmp_path / "model" / "config.json").write_text(text)

    def look(*settings: str, place: tuple[str, ...] = ("2", "2")) -> Finished:
        files = (f"model.path={tmp_path / 'model'}", f"data={tmp_path / 'data.parquet'}")
        arguments = ("sft", *place, "run=any", f"output_dir={tmp_path}", *files, *settings)
        return Process(tmp_path / "look", "tools/check_settings.py", *arguments).wait()

    for settings in ((), ("resume=auto",)):
        look(*settings).succeeded()
    for finished, words in (
        (look("num_step=3"), "num_step=3 is unknown"),
        (look("parallel.tp_size=2", place=("1", "1")), "parallel.tp_size"),
        (look("resume=auto", "seed=3"), "seed"),
    ):
        assert finished.returncode == 2 and "Traceback" not in finished.stderr
        assert finished.stderr.startswith("error: ") and words in finished.stderr


@pytest.mark.parametrize("schema", [GrpoConfig, SftConfig])
@pytest.mark.parametrize("section", ["model", "parallel"])
def test_every_preset_of_a_section_can_be_given_on_the_command_line(schema: type, section: str):
    """After the experiment, whose layout it replaces as a whole, and before single keys."""
    group = "experiment" if schema is GrpoConfig else "sft_experiment"
    kind = "vas" if schema is GrpoConfig else "sft"
    for name in cli.experiments(section):
        arguments = [f"experiment=mmr1_32b_{kind}_512xh100", f"{section}={name}"]
        arguments += ["data.heldout=x"] if schema is GrpoConfig else []
        config = cli.load_config(schema, group, arguments)
        stated = OmegaConf.to_container(OmegaConf.load(cli.CONF_DIR / section / f"{name}.yaml"))
        assert isinstance(stated, dict) and stated.items() <= vars(getattr(config, section)).items()
    config = cli.load_config(
        schema, group, [*arguments, "parallel=tp2_sp", "parallel={cp_size: 2}", "model={path: x}"]
    )
    parallel = config.parallel
    assert (parallel.tp_size, parallel.cp_size, config.model.path) == (2, 2, "x")


def test_help_lists_the_presets_of_every_section():
    command = [sys.executable, "-m", "megatron_mmr1.sft", "--help"]
    output = subprocess.run(command, cwd=cli.CONF_DIR.parent, capture_output=True, text=True).stdout
    for section in ("model", "parallel"):
        assert f"[{section}=NAME]" in output
        assert f"{section}=NAME: {', '.join(cli.experiments(section))}" in output
    assert "sampler=" not in output  # a cold start has none
