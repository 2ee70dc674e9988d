#!/usr/bin/env python3
"""Checks the files of packaging/ against each other, against what the program offers, and against docs/performance.md.

    packaging_check.py [BITNET]       run by packaging_check.sh, in its environment

Without a binary, or with one that has no `serve`, what needs it is passed over, and that is said.
"""

import pathlib
import re
import shlex
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "packaging"
KUBERNETES = PACKAGING / "kubernetes"
PORT = 8080
DRAIN_SECONDS = 30  # --drain-seconds of `bitnet serve`, unless given
OPEN_PATHS = {"/health", "/ready"}  # answered without a key, so a probe can ask them
MARGIN = 1.2  # of a memory limit over what is counted, for connections, grammars and the file cache


class Wrong(Exception):
    """What is wrong, in words that name the file."""


def check(right, message):
    """Fails with the message unless it is right."""
    if not right:
        raise Wrong(message)


def manifest(name, kind):
    """The one document of that kind in a file of packaging/kubernetes."""
    found = [d for d in yaml.safe_load_all((KUBERNETES / name).read_text()) if d["kind"] == kind]
    check(len(found) == 1, f"{name}: {len(found)} documents of kind {kind}")
    return found[0]


def mebibytes(text):
    """2560Mi, 2560M and 2560m, which are the same to Kubernetes, systemd and Compose, as a number."""
    match = re.fullmatch(r"(\d+)(Mi|M|m)", str(text))
    check(match, f"memory limit {text}: not in MiB")
    return int(match[1])


def seconds(text):
    """45 or 45s."""
    return int(str(text).removesuffix("s"))


def option(arguments, name):
    """The value of --name in a list of arguments, `--name=value` or `--name value`."""
    for position, argument in enumerate(arguments):
        if argument == f"--{name}":
            return arguments[position + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


def unit():
    """The settings of bitnet.service, each name with its values in order."""
    settings = {}
    for line in (PACKAGING / "bitnet.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            settings.setdefault(name, []).append(value)
    return settings


class Files:
    """The parsed files, and the arguments that each gives to the program."""

    def __init__(self):
        self.dockerfile = (PACKAGING / "Dockerfile").read_text()
        self.compose = yaml.safe_load((PACKAGING / "compose.yaml").read_text())["services"]["bitnet"]
        self.unit = unit()
        self.deployment = manifest("deployment.yaml", "Deployment")
        self.job = manifest("batch-job.yaml", "Job")
        self.pod = self.deployment["spec"]["template"]["spec"]
        self.container = self.pod["containers"][0]
        self.servers = {
            "compose.yaml": self.compose["command"],
            "bitnet.service": shlex.split(self.unit["ExecStart"][0])[1:],
            "deployment.yaml": self.container["args"],
        }
        self.limits = {
            "compose.yaml": self.compose["mem_limit"],
            "bitnet.service": self.unit["MemoryMax"][0],
            "deployment.yaml": self.container["resources"]["limits"]["memory"],
            "batch-job.yaml": self.job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"],
        }

    def batch_arguments(self):
        """What batch-job.yaml gives to the program."""
        return self.job["spec"]["template"]["spec"]["containers"][0]["args"]


def image_is_not_root(files):
    """The image's user has a number and is not root; its toolchain is the pinned one; pods run as the same user."""
    users = re.findall(r"^USER (\d+):(\d+)$", files.dockerfile, re.M)
    check(users and users[-1][0] != "0", "Dockerfile: the last USER is not a number other than 0")
    toolchain = re.search(r'channel = "([\d.]+)"', (ROOT / "rust-toolchain.toml").read_text())[1]
    check(f"FROM rust:{toolchain}-slim" in files.dockerfile, f"Dockerfile: not built with rust {toolchain}")
    version = re.search(r'^version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    tags = {files.compose["image"].split(":")[1], manifest("kustomization.yaml", "Kustomization")["images"][0]["newTag"]}
    check(tags == {version}, f"images have the tags {tags}, the workspace is {version}")
    for name, spec in (("deployment.yaml", files.pod), ("batch-job.yaml", files.job["spec"]["template"]["spec"])):
        context = spec["securityContext"]
        check(context["runAsNonRoot"] is True, f"{name}: runAsNonRoot")
        check(str(context["runAsUser"]) == users[-1][0], f"{name}: runAsUser is not the image's {users[-1][0]}")
        check(context["seccompProfile"]["type"] == "RuntimeDefault", f"{name}: seccompProfile")
        for container in spec["containers"]:
            context = container["securityContext"]
            check(context["allowPrivilegeEscalation"] is False, f"{name}: allowPrivilegeEscalation")
            check(context["readOnlyRootFilesystem"] is True, f"{name}: readOnlyRootFilesystem")
            check(context["capabilities"] == {"drop": ["ALL"]}, f"{name}: capabilities")
    check(files.compose["read_only"] and files.compose["cap_drop"] == ["ALL"], "compose.yaml: read_only, cap_drop")
    check("no-new-privileges:true" in files.compose["security_opt"], "compose.yaml: no-new-privileges")


def ports_agree(files):
    """One port in the image, the arguments, the container, and what leads to it."""
    check(f"EXPOSE {PORT}\n" in files.dockerfile, f"Dockerfile: EXPOSE is not {PORT}")
    for name, arguments in files.servers.items():
        check(option(arguments, "port") == str(PORT), f"{name}: --port is not {PORT}")
    published = files.compose["ports"]
    check(published == [f"127.0.0.1:{PORT}:{PORT}"], f"compose.yaml publishes {published}: only loopback is safe without TLS")
    names = {port["name"]: port["containerPort"] for port in files.container["ports"]}
    check(names == {"http": PORT}, f"deployment.yaml: ports {names}")
    service = manifest("service.yaml", "Service")["spec"]["ports"][0]
    check(service["targetPort"] in names, f"service.yaml: no container port {service['targetPort']}")
    endpoint = manifest("servicemonitor.yaml", "ServiceMonitor")["spec"]["endpoints"][0]
    check(endpoint["port"] == service["name"], "servicemonitor.yaml: not a port of the Service")
    for rule in manifest("networkpolicy.yaml", "NetworkPolicy")["spec"]["ingress"]:
        check([p["port"] for p in rule["ports"]] == ["http"], "networkpolicy.yaml: not the container's port")


def probes_need_no_key(files):
    """Each probe asks a path that is open, on a port that is there."""
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = files.container[kind]["httpGet"]
        check(get["path"] in OPEN_PATHS and get["port"] == "http", f"deployment.yaml: {kind} asks {get}")
    check(files.container["livenessProbe"]["httpGet"]["path"] == "/health", "deployment.yaml: a pod that loads would be killed")
    check(files.container["readinessProbe"]["httpGet"]["path"] == "/ready", "deployment.yaml: requests would come before the model")


def keys_are_given(files):
    """Whoever binds to more than loopback has keys, and the Secret has what is asked of it."""
    for name, arguments in files.servers.items():
        check(option(arguments, "api-keys"), f"{name}: no --api-keys")
    check("--api-keys=/run/secrets/" + files.compose["secrets"][0] in files.compose["command"], "compose.yaml: not its secret")
    check("%d/" + files.unit["LoadCredential"][0].split(":")[0] in files.unit["ExecStart"][0], "bitnet.service: not its credential")
    secret = manifest("secret.example.yaml", "Secret")
    data = secret["stringData"]
    volume = next(v["secret"] for v in files.pod["volumes"] if "secret" in v)
    check(volume["secretName"] == secret["metadata"]["name"], "deployment.yaml: another Secret than secret.example.yaml")
    mount = next(m["mountPath"] for m in files.container["volumeMounts"] if m["name"] == "keys")
    paths = [f"{mount}/{item['path']}" for item in volume["items"] if item["key"] in data]
    check(paths == [option(files.container["args"], "api-keys")], f"deployment.yaml: --api-keys is not among {paths}")
    credentials = manifest("servicemonitor.yaml", "ServiceMonitor")["spec"]["endpoints"][0]["authorization"]["credentials"]
    check(credentials["name"] == secret["metadata"]["name"], "servicemonitor.yaml: another Secret")
    keys = [line.split(":", 1)[1] for line in data["api-keys"].split()]
    check(data[credentials["key"]] in keys, "secret.example.yaml: Prometheus's key is not among the keys")
    check(len(set(keys)) == len(keys), "secret.example.yaml: a key twice")


def memory_suffices(files):
    """Limits are equal, and hold what docs/performance.md measured, a prompt, keys and values, and a margin."""
    limits = {name: mebibytes(limit) for name, limit in files.limits.items()}
    check(len(set(limits.values())) == 1, f"memory limits differ: {limits}")
    arguments = {**files.servers, "batch-job.yaml": files.batch_arguments()}
    budgets = {name: int(option(given, "kv-memory")) for name, given in arguments.items()}
    check(len(set(budgets.values())) == 1, f"--kv-memory differs: {budgets}")
    text = (ROOT / "docs/performance.md").read_text()
    peak = re.search(r"Peak memory with the exact head and 2-bit weights is (\d+) MiB", text)
    prompt = re.search(r"(\d+) MB for 128 tokens and (\d+) MB for 512", text)
    check(peak and prompt, "docs/performance.md: the peak, or what a prompt takes, is not found where it was")
    # The peak was measured with a prompt of fewer than 128 tokens.
    model = int(peak[1]) + -(-(int(prompt[2]) - int(prompt[1])) * 10**6 // 2**20)
    counted, limit = model + set(budgets.values()).pop(), set(limits.values()).pop()
    print(f"   {model} MiB + {counted - model} for keys and values = {counted}, limit {limit}")
    check(limit >= MARGIN * counted, f"limit {limit} MiB is less than {MARGIN} times {counted}")
    check(f"{limit} MiB" in (PACKAGING / "README.md").read_text(), f"packaging/README.md does not tell the limit, {limit} MiB")
    for name in ("deployment.yaml", "batch-job.yaml"):
        spec = (files.deployment if name[0] == "d" else files.job)["spec"]["template"]["spec"]["containers"][0]["resources"]
        check(spec["requests"] == spec["limits"], f"{name}: requests are not the limits")


def stops_are_patient(files):
    """Each killer waits longer than the server drains."""
    drains = {option(arguments, "drain-seconds") or DRAIN_SECONDS for arguments in files.servers.values()}
    drain = max(map(int, drains))
    check(seconds(files.compose["stop_grace_period"]) > drain, "compose.yaml: stop_grace_period")
    check(seconds(files.unit["TimeoutStopSec"][0]) > drain, "bitnet.service: TimeoutStopSec")
    leaves = files.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    check(files.pod["terminationGracePeriodSeconds"] > drain + leaves, "deployment.yaml: terminationGracePeriodSeconds")


def selectors_select(files):
    """Service, budget, policy, monitor and scaler mean the Deployment's pods, and not those of the Job."""
    pods = files.deployment["spec"]["template"]["metadata"]["labels"]
    jobs = files.job["spec"]["template"]["metadata"]["labels"]
    service = manifest("service.yaml", "Service")
    selectors = {
        "deployment.yaml": files.deployment["spec"]["selector"]["matchLabels"],
        "service.yaml": service["spec"]["selector"],
        "poddisruptionbudget.yaml": manifest("poddisruptionbudget.yaml", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "networkpolicy.yaml": manifest("networkpolicy.yaml", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    }
    for name, selector in selectors.items():
        check(selector.items() <= pods.items(), f"{name}: selects {selector}, pods have {pods}")
        check(not selector.items() <= jobs.items(), f"{name}: selects the pods of batch-job.yaml too")
    monitor = manifest("servicemonitor.yaml", "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    check(monitor.items() <= service["metadata"]["labels"].items(), "servicemonitor.yaml: does not select the Service")
    target = manifest("hpa.yaml", "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    check(target["name"] == files.deployment["metadata"]["name"], "hpa.yaml: not the Deployment")


def scaled_metrics():
    """The metrics that hpa.yaml scales on, with their targets."""
    metrics = manifest("hpa.yaml", "HorizontalPodAutoscaler")["spec"]["metrics"]
    return {m["pods"]["metric"]["name"]: float(m["pods"]["target"]["averageValue"]) for m in metrics}


def metrics_are_adapted(files):
    """prometheus-adapter offers each metric of hpa.yaml, under its own name."""
    rule = yaml.safe_load((KUBERNETES / "prometheus-adapter-values.yaml").read_text())["rules"]["custom"][0]
    series = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])[1]
    for name in scaled_metrics():
        check(re.search(series, name), f"prometheus-adapter-values.yaml: no series {name}")
        check(re.fullmatch(rule["name"]["matches"], name)[1] == name, f"prometheus-adapter-values.yaml: renames {name}")
    running = scaled_metrics()["bitnet_running_sequences"]
    check(running < int(option(files.container["args"], "max-batch")), "hpa.yaml: a full batch does not call for more pods")


def shards_are_complete(files):
    """The Job has as many pods as shards, and each its own."""
    spec = files.job["spec"]
    shard = option(files.batch_arguments(), "shard")
    check(shard == f"$(JOB_COMPLETION_INDEX)/{spec['completions']}", f"batch-job.yaml: {shard} of {spec['completions']} completions")
    check("$(JOB_COMPLETION_INDEX)" in option(files.batch_arguments(), "output"), "batch-job.yaml: pods share an output")
    slurm = (ROOT / "scripts/scale_out/slurm.sh").read_text()
    last, shards = re.search(r"--array=0-(\d+)", slurm)[1], re.search(r"^shards=(\d+)$", slurm, re.M)[1]
    check(int(last) + 1 == int(shards), f"slurm.sh: an array to {last} and {shards} shards")


def excerpts_are_true(_):
    """What docs/scale-out.md shows of a file stands in it, line by line."""
    text = (ROOT / "docs/scale-out.md").read_text()
    excerpts = re.findall(r"^```\w+ (\S+/\S+)\n(.*?)^```$", text, re.M | re.S)
    check(excerpts, "docs/scale-out.md: no excerpt, ```LANGUAGE FILE")
    for path, excerpt in excerpts:
        check((ROOT / path).is_file(), f"docs/scale-out.md: no file {path}")
        lines = {line.strip() for line in (ROOT / path).read_text().splitlines()}
        for line in filter(None, map(str.strip, excerpt.splitlines())):
            check(line in lines, f"docs/scale-out.md: {path} has no line `{line}`")
    print(f"   {len(excerpts)} excerpts")
    for path in re.findall(r"\]\((\.\./[^)#]+|[\w-]+\.md)[)#]", text):
        check((ROOT / "docs" / path).exists(), f"docs/scale-out.md: no file {path}")


def flags_exist(files, bitnet):
    """Every flag in the files stands in the help of its command."""
    for command, arguments in (("batch", {"batch-job.yaml": files.batch_arguments()}), ("serve", files.servers)):
        run = subprocess.run([bitnet, command, "--help"], capture_output=True, text=True)
        if run.returncode != 0:
            check(command == "serve", f"{bitnet} has no command {command}")
            print("   *** SKIPPED: this bitnet has no `serve`, so its flags were NOT checked ***")
            continue
        flags = set(re.findall(r"--[a-z][a-z-]+", run.stdout))
        for name, given in arguments.items():
            used = {argument.split("=")[0] for argument in given if argument.startswith("--")}
            check(given[0] == command, f"{name}: runs {given[0]}")
            check(used <= flags, f"{name}: `bitnet {command}` has no {', '.join(sorted(used - flags))}")


CHECKS = [
    image_is_not_root, ports_agree, probes_need_no_key, keys_are_given, memory_suffices, stops_are_patient,
    selectors_select, metrics_are_adapted, shards_are_complete, excerpts_are_true,
]  # fmt: skip


def main():
    """Runs all checks and tells every failure."""
    files, failures = Files(), 0
    checks = [(one, (files,)) for one in CHECKS]
    if len(sys.argv) > 1:
        checks.append((flags_exist, (files, sys.argv[1])))
    else:
        print("   *** SKIPPED: no binary was given, so flags were NOT checked ***")
    for one, arguments in checks:
        try:
            one(*arguments)
        except (Wrong, KeyError, IndexError, StopIteration, TypeError) as error:
            failures += 1
            print(f"   {one.__name__}: {error if isinstance(error, Wrong) else repr(error)}", file=sys.stderr)
    print(f"   {len(checks) - failures} of {len(checks)} agree")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
