"""The PyTorchJob manifest: its form, and that its parts agree.

The schema here is what we rely on of the operator's own (kubeflow.org/v1), much stricter than that:
unknown keys are errors, which a cluster would drop without a word.
"""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from processes import REPOSITORY

MANIFEST = yaml.safe_load((REPOSITORY / "examples" / "kubernetes" / "pytorchjob.yaml").read_text())


def closed(**properties: Any) -> dict[str, Any]:
    """An object with just these keys, all required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
NAMED = closed(name=TEXT, value=TEXT)
CONTAINER = closed(
    name={"const": "pytorch"},
    image=TEXT,
    workingDir=TEXT,
    command=array(TEXT),
    args=array({"type": "string", "pattern": r"^[a-z_.]+=\S+$"}),
    env=array(NAMED),
    ports=array(closed(name={"const": "pytorchjob-port"}, containerPort=COUNT)),
    resources=closed(limits=closed(**{"nvidia.com/gpu": COUNT})),
    volumeMounts=array(closed(name=TEXT, mountPath=TEXT)),
)
VOLUME = {
    "oneOf": [
        closed(name=TEXT, persistentVolumeClaim=closed(claimName=TEXT)),
        closed(name=TEXT, emptyDir=closed(medium={"const": "Memory"}, sizeLimit=TEXT)),
    ]
}
WORKER = closed(
    replicas=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=closed(
        spec=closed(
            securityContext=closed(fsGroup=COUNT),
            containers=array(CONTAINER),
            volumes=array(VOLUME),
        )
    ),
)
SCHEMA = closed(
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=closed(name=TEXT),
    spec=closed(
        nprocPerNode={"type": "string", "pattern": "^[0-9]+$"},
        elasticPolicy=closed(
            rdzvBackend={"const": "c10d"},
            rdzvId=TEXT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            maxRestarts=COUNT,
            rdzvConf=array(closed(key=TEXT, value=TEXT)),
        ),
        runPolicy=closed(cleanPodPolicy={"enum": ["None", "Running", "All"]}, backoffLimit=COUNT),
        pytorchReplicaSpecs=closed(Worker=WORKER),
    ),
)


def test_the_manifest_has_the_form_of_a_pytorchjob():
    jsonschema.validate(MANIFEST, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "nprocPerNode"), 8),  # the operator takes a string
        (("spec", "elasticPolicy", "maxRestart"), 3),
        (("spec", "pytorchReplicaSpecs", "Worker", "restartPolicy"), "onFailure"),
        (("apiVersion",), "kubeflow.org/v2"),
    ],
)
def test_another_form_is_noticed(path: tuple[str, ...], value: Any):
    wrong = copy.deepcopy(MANIFEST)
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_its_parts_agree():
    """Nodes, GPUs, mounts; and it resumes, in a store that is new at each start."""
    spec = MANIFEST["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert {"run=main", "resume=auto"} <= set(container["args"])
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    user = worker["template"]["spec"]["securityContext"]["fsGroup"]
    assert f"--uid {user} " in dockerfile and f"\nUSER {user}\n" in dockerfile


@pytest.mark.parametrize(("faults", "status"), [(0, 0), (3, 0), (1000, 1)])
def test_a_worker_asks_the_doctor_until_it_finds_nothing_to_do(
    tmp_path: Path, faults: int, status: int
):
    """Small programs in Python's and sleep's place count how often the doctor is asked."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\n[ "$1" = tools/doctor.py ] || { echo "$*" > trained; exit; }\n'
        f'echo "$*" >> asked; [ "$(wc -l < asked)" -gt {faults} ]\n'
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for program in (python, tmp_path / "sleep"):
        program.chmod(0o755)
    worker = MANIFEST["spec"]["pytorchReplicaSpecs"]["Worker"]
    command = worker["template"]["spec"]["containers"][0]["command"]
    search = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": search, "PET_RDZV_ENDPOINT": "mmr1-worker-0:23456"}
    done = subprocess.run([*command, "run=main"], cwd=tmp_path, env=environment)
    assert done.returncode == status
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == min(faults, 90) + 1
    assert "--rdzv mmr1-worker-0:23456 --output-dir /shared/outputs" in asked[0]
    trained = tmp_path / "trained"
    assert trained.exists() == (status == 0)
    if trained.exists():
        assert trained.read_text() == "-m torch.distributed.run -m megatron_mmr1.train run=main\n"
