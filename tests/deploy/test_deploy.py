"""What the image and the manifests promise, checked without an engine or a cluster.

scripts/check.sh deploy runs this file. `kubectl` renders the manifests; PBS_PREFILLD
names a built server. What needs one of them is skipped, with the reason, without it.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import grpc
import pytest
import yaml
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python"))
from real_server import running_server  # noqa: E402

DEPLOY = ROOT / "deploy"
OVERLAYS = ["base", "overlays/cpu-example"]
GIB = 1 << 30

# Parameters of the models that the manifests name; each is held once, in bf16.
PARAMETERS = {
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.2-1b-instruct": 1_235_814_400,
}
PLAN_ERROR = 0.05  # planned and measured bytes of a request agree within this
PROCESS_BYTES = GIB  # code, stacks, heap and page tables
CLOSING_SECONDS = 15  # from the end of the drain to the end of the process


# ---- what is read


def quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity such as 48Gi."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", text).groups()
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


def documented_default(field: str) -> str:
    """The default of a ServerConfig field: what stands last in its comment."""
    proto = (ROOT / "proto/pbs/v1/server_config.proto").read_text()
    return re.search(rf" {field} = \d+;\s*// .*; (\S+)$", proto, re.MULTILINE)[1]


def default_port(field: str) -> int:
    return int(documented_default(field).rsplit(":", 1)[1])


def server_config_class():
    """pbs.v1.ServerConfig from the committed descriptor set of the configuration."""
    files = descriptor_pb2.FileDescriptorSet.FromString(
        (ROOT / "proto/server_config.binpb").read_bytes()
    )
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("pbs.v1.ServerConfig")
    )


def render(overlay: str) -> list[dict]:
    """The objects of a kustomization; without kubectl only the base, as it stands."""
    folder = DEPLOY / "kustomize" / overlay
    if shutil.which("kubectl"):
        rendered = subprocess.run(
            ["kubectl", "kustomize", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
        return list(yaml.safe_load_all(rendered.stdout))
    if overlay != "base":
        pytest.skip("NOT RUN: there is no kubectl to render the overlay")
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    texts = [(folder / name).read_text() for name in kustomization["resources"]]
    objects = [o for text in texts for o in yaml.safe_load_all(text)]
    for generated in kustomization["configMapGenerator"]:
        data = {name: (folder / name).read_text() for name in generated["files"]}
        name = {"name": generated["name"]}
        objects.append({"kind": "ConfigMap", "metadata": name, "data": data})
    return objects


class Manifests:
    """The rendered objects of one kustomization."""

    def __init__(self, overlay: str):
        self.objects = render(overlay)
        self.deployment = self.named("Deployment", "pbs-prefill")
        self.pod = self.deployment["spec"]["template"]["spec"]
        (self.container,) = self.pod["containers"]
        (config_map,) = [o for o in self.objects if o["kind"] == "ConfigMap"]
        self.server_json = config_map["data"]["server.json"]
        self.config = json_format.Parse(self.server_json, server_config_class()())

    def named(self, kind: str, name: str) -> dict:
        (found,) = [
            o
            for o in self.objects
            if o["kind"] == kind and o["metadata"]["name"] == name
        ]
        return found


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request) -> Manifests:
    return Manifests(request.param)


@pytest.fixture(scope="module")
def server() -> str:
    program = os.environ.get("PBS_PREFILLD", "")
    if not os.access(program, os.X_OK):
        pytest.skip("NOT RUN: PBS_PREFILLD names no built server")
    return program


@pytest.fixture(scope="module")
def health(server):
    """Health v1 of a running server without models; it has to drain at the end."""
    with running_server("--metrics-listen=127.0.0.1:0") as running:
        with grpc.insecure_channel(running.target) as channel:
            yield health_pb2_grpc.HealthStub(channel)


def dockerfile() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments) of every instruction, in order."""
    text = re.sub(
        r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE
    )
    stage, instructions = "", []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = arguments.split()[-1]
        instructions.append((stage, instruction, " ".join(arguments.split())))
    return instructions


def arguments_of(stage: str, instruction: str) -> list[str]:
    return [a for s, i, a in dockerfile() if s == stage and i == instruction]


def build_packages() -> list[str]:
    """The list of scripts/common.sh, which the build stage sources."""
    ask = "source scripts/common.sh; declare -F install_packages >/dev/null; "
    ask += 'printf "%s\\n" "${build_packages[@]}"'
    return subprocess.run(
        ["bash", "-euc", ask], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()


# ---- the image


def test_the_build_stage_installs_the_packages_of_the_scripts_and_no_others():
    runs = [run for run in arguments_of("build", "RUN") if "install" in run]
    assert runs == [
        "bash -euo pipefail -c '. scripts/common.sh && install_packages "
        '"${build_packages[@]}"\' && rm -rf /var/lib/apt/lists/*'
    ]
    assert not [run for run in arguments_of("build", "RUN") if "apt-get" in run]
    assert {"g++", "cmake", "ninja-build"} <= set(build_packages())


def test_the_distribution_has_every_package_of_the_build():
    if not shutil.which("apt-cache"):
        pytest.skip("NOT RUN: there is no apt-cache")
    policy = subprocess.run(
        ["apt-cache", "policy", *build_packages()],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    ).stdout
    found = set(re.findall(r"^(\S+):\n.*\n +Candidate: [^(]", policy, re.MULTILINE))
    if "g++" not in found:
        pytest.skip("NOT RUN: apt has no package lists")
    assert [name for name in build_packages() if name not in found] == []


def test_the_cuda_stage_installs_what_the_build_stage_found():
    (made,) = [r for r in arguments_of("build", "RUN") if "runtime_root.sh" in r]
    assert "deploy/runtime_root.sh build/bin/pbs-prefilld /out/root " in made
    assert "--from=build /out/root/usr/local/ /usr/local/" in arguments_of(
        "runtime-cuda", "COPY"
    )
    (install,) = [r for r in arguments_of("runtime-cuda", "RUN") if "apt-get" in r]
    assert re.search(
        r"xargs apt-get install -y -qq --no-install-recommends "
        r"</usr/local/share/doc/pbs-prefill/runtime-packages ",
        install,
    )


def test_the_cpu_image_is_what_was_laid_out_and_nothing_else():
    assert arguments_of("runtime-cpu", "FROM") == ["scratch AS runtime-cpu"]
    assert arguments_of("runtime-cpu", "COPY") == ["--from=build /out/root/ /"]
    assert arguments_of("runtime-cpu", "ENV") == ["PATH=/usr/local/bin"]
    (run,) = arguments_of("runtime-cpu", "RUN")
    assert json.loads(run) == ["pbs-prefilld", "--version"], "it has no shell"


def test_both_images_are_started_and_described_alike():
    alike = ("USER", "STOPSIGNAL", "EXPOSE", "ENTRYPOINT", "ARG", "LABEL")
    for instruction in alike:
        cpu = arguments_of("runtime-cpu", instruction)
        assert cpu
        assert arguments_of("runtime-cuda", instruction) == cpu
    assert '["pbs-prefilld", "--version"]' in arguments_of("runtime-cuda", "RUN")


def test_what_the_build_copies_is_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "an allow list: nothing enters the context unnamed"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    cmake = (ROOT / "CMakeLists.txt").read_text()
    needed = set(re.findall(r"^\s*add_subdirectory\((\w+)", cmake, re.MULTILINE))
    needed |= {"CMakeLists.txt", "CMakePresets.json", "LICENSE", "cmake", "scripts"}
    needed |= {"deploy/runtime_packages.sh", "deploy/runtime_root.sh"}
    assert needed <= allowed
    assert [name for name in allowed if not (ROOT / name).exists()] == []


def test_the_image_stops_drains_and_listens_as_the_server_expects():
    assert arguments_of("runtime-cpu", "STOPSIGNAL") == ["SIGTERM"]
    ports = [default_port("listen"), default_port("metrics_listen")]
    assert arguments_of("runtime-cpu", "EXPOSE") == [" ".join(map(str, ports))]
    (entry_point,) = arguments_of("runtime-cpu", "ENTRYPOINT")
    assert json.loads(entry_point) == [
        "pbs-prefilld",
        "--listen",
        f"0.0.0.0:{ports[0]}",
        "--metrics-listen",
        f"0.0.0.0:{ports[1]}",
    ]


def test_the_image_is_of_this_version_and_the_cpu_image_is_the_default():
    version = re.search(
        r"project\(.* VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()
    )[1]
    assert f"VERSION={version}" in arguments_of("runtime-cpu", "ARG")
    assert dockerfile()[-1][0] == "runtime-cpu", "the last stage is the default"


def test_the_image_and_the_pod_run_as_the_same_user_that_is_not_root(manifests):
    (user,) = arguments_of("runtime-cpu", "USER")
    uid, gid = map(int, user.split(":"))
    context = manifests.pod["securityContext"]
    assert uid > 0 and gid > 0
    assert (context["runAsUser"], context["runAsGroup"]) == (uid, gid)


# ---- the pod


def test_the_pod_has_no_privileges_and_writes_only_to_its_tmp(manifests):
    pod, container = manifests.pod, manifests.container
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = [m["name"] for m in container["volumeMounts"] if not m.get("readOnly")]
    assert writable == ["tmp"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert quantity(volumes["tmp"]["emptyDir"]["sizeLimit"]) <= 64 << 20
    assert volumes["models"]["persistentVolumeClaim"]["readOnly"] is True


def test_ports_are_the_servers_everywhere(manifests):
    grpc, metrics = default_port("listen"), default_port("metrics_listen")
    assert manifests.config.listen == f"0.0.0.0:{grpc}"
    assert manifests.config.metrics_listen == f"0.0.0.0:{metrics}"
    ports = {
        port["name"]: port["containerPort"] for port in manifests.container["ports"]
    }
    assert ports == {"grpc": grpc, "metrics": metrics}
    for name in ("pbs-prefill", "pbs-prefill-headless"):
        (port,) = manifests.named("Service", name)["spec"]["ports"]
        assert (port["port"], port["targetPort"]) == (grpc, "grpc")
        assert port["appProtocol"] == "kubernetes.io/h2c"
    (port,) = manifests.named("Service", "pbs-prefill-metrics")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (metrics, "metrics")
    annotations = manifests.deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(metrics)
    policy = manifests.named("NetworkPolicy", "pbs-prefill")["spec"]
    open_ports = [[p["port"] for p in rule["ports"]] for rule in policy["ingress"]]
    assert open_ports == [[grpc], [metrics]]


def test_every_selector_selects_the_pods(manifests):
    labels = manifests.deployment["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        manifests.deployment["spec"]["selector"]["matchLabels"],
        manifests.named("PodDisruptionBudget", "pbs-prefill")["spec"]["selector"][
            "matchLabels"
        ],
        manifests.named("NetworkPolicy", "pbs-prefill")["spec"]["podSelector"][
            "matchLabels"
        ],
        *[o["spec"]["selector"] for o in manifests.objects if o["kind"] == "Service"],
        *[
            c["labelSelector"]["matchLabels"]
            for c in manifests.pod["topologySpreadConstraints"]
        ],
    ]
    assert len(selectors) == 8
    for selector in selectors:
        assert selector.items() <= labels


def test_probes_ask_for_readiness_and_liveness_on_the_serving_port(manifests):
    probes = {
        kind: manifests.container[f"{kind}Probe"]["grpc"]
        for kind in ("startup", "readiness", "liveness")
    }
    port = default_port("listen")
    assert probes == {
        "startup": {"port": port, "service": ""},
        "readiness": {"port": port, "service": ""},
        "liveness": {"port": port, "service": "liveness"},
    }
    startup = manifests.container["startupProbe"]
    startup_seconds = startup["periodSeconds"] * startup["failureThreshold"]
    assert startup_seconds >= 600, "time to load a large model"
    assert manifests.deployment["spec"]["progressDeadlineSeconds"] > startup_seconds


def test_the_server_knows_the_services_that_the_probes_ask_for(manifests, health):
    for kind in ("startup", "readiness", "liveness"):
        service = manifests.container[f"{kind}Probe"]["grpc"]["service"]
        answer = health.Check(
            health_pb2.HealthCheckRequest(service=service), timeout=10
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_drain_ends_before_the_grace_period(manifests):
    sleep = manifests.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = manifests.config.drain_seconds_max
    assert manifests.config.HasField("drain_seconds_max")
    grace = manifests.pod["terminationGracePeriodSeconds"]
    assert grace >= sleep + drain + CLOSING_SECONDS


def test_a_rollout_and_a_node_drain_keep_the_tier_serving(manifests):
    spec = manifests.deployment["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    budget = manifests.named("PodDisruptionBudget", "pbs-prefill")["spec"]
    assert budget["maxUnavailable"] < spec["replicas"]


def test_memory_adds_up_to_less_than_the_limit(manifests):
    resources = manifests.container["resources"]
    assert resources["requests"] == resources["limits"]
    weights = sum(2 * PARAMETERS[model.name] for model in manifests.config.models)
    admission = manifests.config.admission.memory_bytes_max
    assert admission > 0
    needed = (
        weights
        + admission * (1 + PLAN_ERROR)
        + int(documented_default("memory_quota_bytes"))
        + PROCESS_BYTES
    )
    limit = quantity(resources["limits"]["memory"])
    assert needed <= limit, f"{needed / GIB:.2f} GiB of {limit / GIB:.2f}"
    assert admission >= limit / 2, "most of the pod is for requests, not slack"


def test_the_network_is_closed_but_for_routers_decode_nodes_and_monitoring(manifests):
    policy = manifests.named("NetworkPolicy", "pbs-prefill")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    (clients,), (monitoring,) = [rule["from"] for rule in policy["ingress"]]
    assert set(clients) == {"podSelector"}, "of the same namespace"
    wanted = {
        (e["key"].split("/")[1], e["operator"], *e["values"])
        for e in clients["podSelector"]["matchExpressions"]
    }
    assert wanted == {("part-of", "In", "pbs"), ("component", "In", "router", "decode")}
    namespace = {"kubernetes.io/metadata.name": "monitoring"}
    assert monitoring == {"namespaceSelector": {"matchLabels": namespace}}
    (egress,) = policy["egress"]
    assert egress["to"] and {port["port"] for port in egress["ports"]} == {53}


# ---- the configuration


def test_models_are_read_from_the_mounted_volume(manifests):
    assert manifests.config.models
    mounts = {m["name"]: m["mountPath"] for m in manifests.container["volumeMounts"]}
    for model in manifests.config.models:
        assert model.path.startswith(mounts["models"] + "/")
        assert model.kv_dtype == "bf16", "the memory limit is computed for bf16"
    config_path = manifests.container["args"][
        manifests.container["args"].index("--config") + 1
    ]
    assert config_path == mounts["config"] + "/server.json"


def test_an_unknown_field_of_the_configuration_is_refused(manifests):
    document = json.loads(manifests.server_json) | {"drain_seconds": 60}
    with pytest.raises(json_format.ParseError, match="drain_seconds"):
        json_format.Parse(json.dumps(document), server_config_class()())


def test_the_server_accepts_the_configuration(manifests, server, tmp_path):
    path = tmp_path / "server.json"
    path.write_text(manifests.server_json)
    checked = subprocess.run(
        [server, "--check-config", "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
