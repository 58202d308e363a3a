"""Ray clusters with a job server, whose nodes come and go.

`RayCluster` is made of `ray start` processes with addresses of their own; `RayletCluster` of the raylets of
`ray.cluster_utils.Cluster`, which share an address.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

_RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def pids_naming(text):
    """Processes with `text` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


class RayCluster:
    """`environment` is a submitter's; ports, session directory and HOME are the cluster's own.

    With a token it lies where Ray looks for it, ~/.ray/auth_token, and no variable says that it is to be used.
    """

    def __init__(self, head_cpus=4, token=None):
        self._head_cpus, self._token = head_cpus, token
        self.directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets have short paths
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment |= {"HOME": self.directory, "RAY_enable_metrics_collection": "0"}
        if token is None:
            self.environment["RAY_AUTH_MODE"] = "disabled"
        else:
            Path(self.directory, ".ray").mkdir()
            Path(self.directory, ".ray/auth_token").write_text(token + "\n")
        self._nodes = {}
        self._n = 0
        self._port, self._dashboard = free_ports(2)
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{self._dashboard}"

    def __enter__(self):
        self.start_head()
        return self

    def __exit__(self, *exc):
        for process in self._nodes.values():
            process.terminate()
        deadline = time.monotonic() + 40
        while pids := pids_naming(self.directory):
            if time.monotonic() > deadline:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        for process in self._nodes.values():
            process.wait(timeout=30)
        shutil.rmtree(self.directory, ignore_errors=True)

    def start_head(self):
        """A head with job server; after `kill_head`, a new one at the same address that knows nothing."""
        agent, client = free_ports(2)
        options = {
            "port": self._port,
            "dashboard-port": self._dashboard,
            "dashboard-agent-listen-port": agent,
        }
        options |= {
            "ray-client-server-port": client,
            "node-ip-address": "127.0.0.1",
            "dashboard-host": "127.0.0.1",
        }
        log = self._start("head", ["--head", *(f"--{k}={v}" for k, v in options.items())], self._head_cpus)
        self._wait_for(f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", "head", log)

    def add_node(self, num_cpus=2, **environment):
        """Its name; `environment` is what its processes have in addition."""
        self._n += 1
        name = f"node{self._n}"
        options = [f"--address=127.0.0.1:{self._port}", f"--node-ip-address=127.0.0.{self._n + 1}"]
        [agent] = free_ports(1)
        self._start(name, [*options, f"--dashboard-agent-listen-port={agent}"], num_cpus, environment)
        return name

    def wait_for_nodes(self, n, timeout_s=120):
        """Until so many nodes have joined, the head among them; not with a token."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.node_ids()) != n:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    def node_ids(self):
        """By address, of the nodes that are alive; not with a token."""
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/nodes?view=summary"
        with urllib.request.urlopen(url, timeout=30) as answer:
            nodes = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
        return {n["nodeManagerAddress"]: n["nodeId"] for n in nodes if n.get("state") == "ALIVE"}

    def _start(self, name, options, num_cpus, environment=None):
        directory = Path(self.directory, f"{name}-{time.monotonic_ns() % 10**6}")
        directory.mkdir()
        shared = [f"--num-cpus={num_cpus}", f"--object-store-memory={100 * 1024**2}"]
        if name == "head":
            shared.append(f"--temp-dir={directory}")
        with open(directory / "out", "w") as out:
            self._nodes[name] = subprocess.Popen(
                [*_RAY, *options, *shared],
                env=self.environment | (environment or {}),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return directory / "out"

    def kill(self, name):
        """SIGKILL to all processes of a node, as when the machine goes down."""
        process = self._nodes.pop(name)
        os.killpg(process.pid, signal.SIGSTOP)  # `ray start --block` would else tidy up
        victims = [process.pid, *_descendants(process.pid)]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def remove(self, name):
        """SIGTERM, as a scheduler does that takes a node back; its workers end with it."""
        process = self._nodes.pop(name)
        process.terminate()
        process.wait(timeout=60)

    def _wait_for(self, url, name, out):
        deadline = time.monotonic() + 120
        while True:
            try:
                return urllib.request.urlopen(url, timeout=5).read()
            except urllib.error.HTTPError as err:
                if err.code == 401 and self._token:
                    return None
                time.sleep(0.5)
            except OSError:
                assert self._nodes[name].poll() is None, out.read_text()
                assert time.monotonic() < deadline, out.read_text()
                time.sleep(0.5)


class RayletCluster:
    """`environment` is a submitter's; the processes are this one's children."""

    def __init__(self, head_cpus=4):
        self.directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        [port] = free_ports(1)
        own = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": self.directory,
            "RAY_enable_metrics_collection": "0",
        }
        self._environ = mock.patch.dict(os.environ, own)  # nodes have what this process has
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | own
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        self._head = {"num_cpus": head_cpus, "include_dashboard": True, "dashboard_port": port}
        self._head |= {"dashboard_agent_listen_port": None, "object_store_memory": 100 * 1024**2}

    def __enter__(self):
        from ray.cluster_utils import Cluster

        self._environ.start()
        self._cluster = Cluster(initialize_head=True, head_node_args=self._head)
        assert self._cluster.webui_url in self.environment["RAY_API_SERVER_ADDRESS"]
        return self

    def __exit__(self, *exc):
        self._cluster.shutdown()
        self._environ.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def add_node(self, num_cpus=2):
        """The node, once it has joined."""
        return self._cluster.add_node(num_cpus=num_cpus, object_store_memory=100 * 1024**2)

    def kill(self, node):
        """SIGKILL to all processes of a node."""
        self._cluster.remove_node(node, allow_graceful=False)

    def remove(self, node):
        """SIGTERM first."""
        self._cluster.remove_node(node, allow_graceful=True)


def _descendants(pid):
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        queue += children.get(queue.pop(), [])
        found = list(dict.fromkeys([*found, *queue]))
    return found
