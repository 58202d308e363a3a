"""A real Slurm of several nodes on one Linux machine, by root, with Debian's packages slurm-wlm and munge.

The login host and each node have processes, network, host name and mounts of their own (unshare), joined by a bridge: what
a job kills (`ray stop`) lies on its node, and nothing here sees the machine's other processes. Home and code are
shared, as on a parallel file system; /tmp/ray and /dev/shm are a node's own. GPUs are as many as are claimed, and made of nothing.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "nsenter", "unshare", "ip", "setpriv")
USER = "researcher"
UID = 2000
_NET = "10.77.0"  # of a bridge that only these namespaces see

_CONF = """
ClusterName=namespaces
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmctldLogFile={place}/slurmctld.log
SlurmctldPidFile={place}/slurmctld.pid
SlurmdSpoolDir={place}/spool.%n
SlurmdLogFile={place}/slurmd.%n.log
SlurmdPidFile={place}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName=node[1-{n_nodes}] CPUs={cpus} RealMemory={memory_mib} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Starts on entry, and ends all that ran in it on exit.

    Args:
        place: a new directory, for configuration, logs and state.
        home: the user's home, which every node sees; it is given to the user with all that it holds.
        n_nodes, cpus, gpus, memory_mib: the nodes, and what each claims to have.
    """

    def __init__(
        self,
        place: Path,
        home: Path,
        *,
        n_nodes: int = 2,
        cpus: int = 2,
        gpus: int = 1,
        memory_mib: int = 8000,
    ) -> None:
        self.place, self.home = place, home
        self.nodes = [f"node{i + 1}" for i in range(n_nodes)]
        self._conf = _CONF.format(place=place, n_nodes=n_nodes, cpus=cpus, gpus=gpus, memory_mib=memory_mib)
        self._gpus = gpus
        self._held: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}

    def __enter__(self) -> "SlurmCluster":
        self.place.mkdir(parents=True)
        self.place.chmod(0o755)
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.place / name).mkdir()
        for i in range(self._gpus):
            (self.place / f"gpu{i}").touch()
        gres = "".join(f"Name=gpu File={self.place}/gpu{i}\n" for i in range(self._gpus))
        (self.place / "gres.conf").write_text(gres)
        (self.place / "slurm.conf").write_text(self._conf)
        (self.place / "munge.key").write_bytes(os.urandom(128))
        (self.place / "munge.key").chmod(0o600)
        hosts = ["127.0.0.1 localhost", f"{_NET}.1 login"]
        hosts += [f"{_NET}.{10 + i} {node}" for i, node in enumerate(self.nodes)]
        (self.place / "hosts").write_text("\n".join(hosts) + "\n")
        for name, line in (
            ("passwd", f"{USER}:x:{UID}:{UID}::{self.home}:/bin/bash"),
            ("group", f"{USER}:x:{UID}:"),
        ):
            (self.place / name).write_text(f"{Path('/etc', name).read_text().rstrip()}\n{line}\n")
        self.home.mkdir(parents=True, exist_ok=True)
        subprocess.run(["chown", "-R", f"{UID}:{UID}", str(self.home)], check=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._held.values():
            held.kill()  # --kill-child: the first process of the namespace goes, and all others with it
        for held in self._held.values():
            held.wait()

    def _start(self) -> None:
        self._host("login")
        self._root("login", "ip link add bridge0 type bridge && ip link set bridge0 up")
        self._root("login", f"ip address add {_NET}.1/24 dev bridge0")
        for node in self.nodes:
            self._join(node)
        self._root(
            "login",
            f"munged --force --key-file={self.place}/munge.key --socket={self.place}/munge.socket "
            f"--pid-file={self.place}/munged.pid --log-file={self.place}/munged.log --seed-file={self.place}/munge.seed",
            "slurmctld",
        )
        for node in self.nodes:
            self._root(node, "slurmd")
        self._all_idle()

    def _all_idle(self) -> None:
        self.until(
            lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.nodes), 60
        )

    def _join(self, node: str) -> None:
        """The node's namespaces, and a cable to the bridge."""
        self._host(node)
        i = self.nodes.index(node)
        self._root(
            "login",
            f"ip link add to_{node} type veth peer name eth0",
            f"ip link set to_{node} master bridge0 up",
        )
        only_net = ["nsenter", f"--target={self._pids['login']}", "--net"]  # processes as seen from here
        subprocess.run([*only_net, "ip", "link", "set", "eth0", "netns", str(self._pids[node])], check=True)
        self._root(node, f"ip address add {_NET}.{10 + i}/24 dev eth0", "ip link set eth0 up")
        self._root(
            node, f"ip route add default via {_NET}.1"
        )  # leads nowhere; Ray asks it for the node's address

    def _host(self, name: str) -> None:
        """Namespaces called `name`, held by a shell that reaps what is orphaned in them."""
        setup = [f"mount --bind {self.place}/{file} /etc/{file}" for file in ("hosts", "passwd", "group")]
        setup += [f"hostname {name}", "ip link set lo up", "mkdir -p /tmp/ray"]
        setup += [f"mount -t tmpfs -o mode=1777 own {path}" for path in ("/tmp/ray", "/dev/shm")]
        setup += [f"touch {self.place}/{name}.up", "sleep infinity & wait"]
        namespaces = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--ipc", "--mount"]
        (self.place / f"{name}.up").unlink(missing_ok=True)
        held = subprocess.Popen(["unshare", *namespaces, "bash", "-ec", "\n".join(setup)])
        self._held[name] = held
        self.until((self.place / f"{name}.up").exists, 10)
        children = Path(f"/proc/{held.pid}/task/{held.pid}/children").read_text().split()
        self._pids[name] = int(children[0])

    def enter(self, host: str) -> list[str]:
        """What starts a program on a host, as root."""
        return ["nsenter", f"--target={self._pids[host]}", "--net", "--pid", "--mount", "--uts", "--ipc"]

    def _root(self, host: str, *lines: str) -> None:
        subprocess.run(
            [*self.enter(host), "bash", "-ec", "\n".join(lines)],
            env=os.environ | {"SLURM_CONF": str(self.place / "slurm.conf")},
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def kill_node(self, node: str) -> None:
        """The node's power is cut: all of its processes and its network are gone."""
        self._held[node].kill()
        self._held.pop(node).wait()
        self._root("login", f"ip link delete to_{node} 2> /dev/null || true")  # the kernel may take its time

    def revive(self, node: str) -> None:
        """The node is switched on again."""
        self._join(node)
        self._root(node, "slurmd")
        self.root("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._all_idle()

    def root(self, *command: str) -> None:
        """A command of the administrator on the login host."""
        self._root("login", shlex.join(command))

    def popen(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: object
    ) -> subprocess.Popen[str]:
        """A command of the user on the login host, in the home unless `cwd` says where."""
        variables = {"HOME": str(self.home), "USER": USER, "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        variables |= {"SLURM_CONF": str(self.place / "slurm.conf"), **(env or {})}
        become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
        where = str(options.pop("cwd", self.home))
        return subprocess.Popen(
            [*self.enter("login"), f"--wd={where}", *become, *command],
            env=variables,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command of the user prints; `AssertionError` with its complaint if it fails."""
        child = self.popen(command, env, cwd=cwd or self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, complaint = child.communicate()
        assert child.returncode == 0, f"{command} ended with {child.returncode}: {complaint}{out}"
        return out

    @staticmethod
    def until(condition: Callable[[], bool], timeout_s: float) -> None:
        """Return once `condition()` holds; `AssertionError` if it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s"
            time.sleep(0.2)


def missing() -> list[str]:
    """What this machine lacks for a `SlurmCluster`."""
    lacks = [name for name in PROGRAMS if shutil.which(name) is None]
    return lacks + ([] if os.geteuid() == 0 else ["root"])
