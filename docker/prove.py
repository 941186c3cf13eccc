"""Build the Dockerfile and run the result on a Debian machine without a Docker engine. As root:

    python docker/prove.py serve BUNDLE PNG
    python docker/prove.py train IMAGES
    python docker/prove.py --release trixie serve BUNDLE PNG

It makes a base image with debootstrap, builds the target on it with buildah (chroot isolation, vfs storage) and runs
it with crun, with the user, capabilities, read-only root, tmpfs, /dev/shm and open-file limit that compose.yaml
gives to `jepakit`, in a network of its own that has only loopback.

`serve` makes a key, starts the service with one bundle, waits for the image's health check, embeds a PNG, sends it
without a key, tries to write to the root, and ends the service with SIGTERM. `train` adapts a tiny model for two steps
and exports it. Any step that fails raises. Needs the Debian packages buildah, crun, debootstrap and curl;
docs/operate.md says what a pass proves. Everything is kept in a temporary folder that is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# crun refuses a machine that mixes the two versions of cgroups, as some do, so the second one is hidden from it. It
# makes no cgroup of its own, because who may do so depends on the machine.
_CRUN = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'umount --quiet /sys/fs/cgroup/unified; exec crun --cgroup-manager disabled "$@"',
    "sh",
)
# As Docker mounts a tmpfs.
_MOUNT = ("nosuid", "nodev", "noexec")
_SHIFT = {"k": 10, "m": 20, "g": 30}


def run(*command: str | Path) -> str:
    """Run a program, show it, and return what it printed. Raises CalledProcessError."""
    print("+", *map(str, command), flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


class Image:
    """An image in a buildah store of its own, and its files."""

    def __init__(self, work: Path, target: str, release: str) -> None:
        self._buildah = ("buildah", "--storage-driver", "vfs", "--root", work / "store", "--runroot", work / "runroot")
        base, tag = "localhost/base", f"localhost/jepakit-{target}"
        self._make_base(work / "base", base, release)
        started = time.monotonic()
        self._run(
            "bud",
            "--isolation",
            "chroot",
            "--format",
            "docker",
            "--layers=false",
            "--build-arg",
            f"BASE={base}",
            "--target",
            target,
            "--tag",
            tag,
            ROOT,
        )
        container = self._run("from", tag)
        inspected = json.loads(self._run("inspect", "--type", "image", tag))
        self.config: dict[str, Any] = inspected["Docker"]["config"]
        self.files = Path(self._run("mount", container))
        size = run("du", "-sm", self.files).split()[0]
        print(f"built {target} in {time.monotonic() - started:.0f} s: {size} MB with its base", flush=True)

    def _run(self, *arguments: str | Path) -> str:
        return run(*self._buildah, *arguments)

    def _make_base(self, folder: Path, tag: str, release: str) -> None:
        """A release of Debian with its Python, and this machine's certificate authorities."""
        run(
            "debootstrap",
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            release,
            folder,
            "http://deb.debian.org/debian",
        )
        shutil.copyfile(CERTIFICATES, folder / CERTIFICATES.lstrip("/"))
        container = self._run("from", "scratch")
        self._run("add", "--quiet", container, folder, "/")
        for name in ("SSL_CERT_FILE", "PIP_CERT"):
            self._run("config", "--env", f"{name}={CERTIFICATES}", container)
        self._run("commit", "--quiet", "--rm", container, tag)


def bytes_of(size: str) -> int:
    """Compose's `1g` in bytes."""
    return int(size[:-1]) << _SHIFT[size[-1]]


def runtime_config(image: Image, service: dict[str, Any], command: Sequence[str], mounts: dict[str, Path]) -> Any:
    """The OCI runtime's config.json: the image's own settings, and what compose.yaml adds to them.

    `mounts` are `{path in the container: folder}`, read-only except for /out. Limits on memory and processes are left
    out, because they need a cgroup manager.
    """
    user, group = map(int, service["user"].split(":"))
    tmpfs = [
        {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": [*_MOUNT, *options.split(",")]}
        for path, _, options in (entry.partition(":") for entry in service["tmpfs"])
    ]
    shm = f"size={bytes_of(service['shm_size'])}"
    binds = [
        {
            "destination": path,
            "type": "bind",
            "source": str(folder),
            "options": ["bind", "rw" if path == "/out" else "ro"],
        }
        for path, folder in mounts.items()
    ]
    nofile = min(service["ulimits"]["nofile"], resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": user, "gid": group},
            "args": [*image.config["Entrypoint"], *command],
            "env": image.config["Env"],
            "cwd": "/",
            "capabilities": {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": nofile, "soft": nofile}],
            "noNewPrivileges": "no-new-privileges:true" in service["security_opt"],
        },
        "root": {"path": str(image.files), "readonly": service["read_only"]},
        "hostname": "jepakit",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*_MOUNT, "mode=1777", shm]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "nodev", "ro"]},
            *tmpfs,
            *binds,
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
    }


class Container:
    """A container that runs one command; `process` ends with the exit code of the container's first process."""

    def __init__(self, work: Path, config: Any) -> None:
        bundle = Path(tempfile.mkdtemp(prefix="oci-", dir=work))
        (bundle / "config.json").write_text(json.dumps(config))
        self._name = bundle.name
        self._crun = (*_CRUN, "--root", str(work / "crun"))
        print("+ in the image:", *config["process"]["args"], flush=True)
        self.process = subprocess.Popen(
            (*self._crun, "run", "--bundle", str(bundle), self._name), stdin=subprocess.DEVNULL
        )

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill(signal.SIGKILL)
            self.process.wait()

    def inside(self, *command: str) -> int:
        """The exit code of a command run in the container."""
        return subprocess.run(
            (*self._crun, "exec", self._name, *command),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode

    def on_its_network(self, *command: str | Path) -> str:
        """What one of this machine's programs prints when it runs in the container's network."""
        state = json.loads(run(*self._crun, "state", self._name))
        return run("nsenter", "--target", str(state["pid"]), "--net", *command)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the first process."""
        run(*self._crun, "kill", self._name, str(number.value))

    def end(self, within_s: float) -> None:
        """Wait until it has ended with exit code 0; anything else raises SystemExit."""
        if (status := self.process.wait(timeout=within_s)) != 0:
            raise SystemExit(f"ended with exit code {status}, not 0")


def prove_serve(image: Image, service: dict[str, Any], work: Path, bundle: Path, picture: Path) -> None:
    """A key, health, an embedding, a refusal, a root that cannot be written to, a clean end."""
    keys = work / "keys"
    keys.mkdir()
    os.chown(keys, *map(int, service["user"].split(":")))
    config = runtime_config(
        image, service, ["serve", "--new-key", "proof", "--api-key-file", "/out/keys"], {"/out": keys}
    )
    config["process"]["args"] = ["sh", "-c", 'exec "$0" "$@" > /out/shown', *config["process"]["args"]]
    with Container(work, config) as container:
        container.end(60)
    key = next(word for word in (keys / "shown").read_text().split() if word.startswith("jk_"))

    mounts = {f"/bundles/{bundle.name}": bundle.resolve(), "/keys": keys}
    with Container(work, runtime_config(image, service, image.config["Cmd"], mounts)) as container:
        started = time.monotonic()
        while container.inside("python", "/opt/jepakit/healthcheck.py") != 0:
            if container.process.poll() is not None or time.monotonic() - started > 180:
                raise SystemExit(f"not healthy after {time.monotonic() - started:.0f} s")
            time.sleep(1)
        print(f"healthy after {time.monotonic() - started:.0f} s", flush=True)
        curl = (
            "curl",
            "--silent",
            "--noproxy",
            "*",
            "--data-binary",
            f"@{picture}",
            "--header",
            "Content-Type: image/png",
            "http://127.0.0.1:8000/v1/embeddings",
        )
        answer = json.loads(container.on_its_network(*curl, "--header", f"Authorization: Bearer {key}"))
        print(f"embedded: {len(answer['data'][0]['embedding'])} numbers of {answer['model']} on {answer['provider']}")
        refused = json.loads(container.on_its_network(*curl))["error"]["code"]
        if refused != "missing_api_key":
            raise SystemExit(f"a request without a key was answered {refused}")
        if (
            container.inside("touch", "/var/tmp/written") == 0
        ):  # anybody could write there if the root were not read-only
            raise SystemExit("the root can be written to")
        container.kill(signal.SIGTERM)
        container.end(90)
    print("SIGTERM: exit code 0", flush=True)


def prove_train(image: Image, service: dict[str, Any], work: Path, images: Path) -> None:
    """Two steps of a tiny model, and its export."""
    out = work / "out"
    out.mkdir()
    os.chown(out, *map(int, service["user"].split(":")))
    mounts = {"/images": images.resolve(), "/out": out}
    for command in (
        (
            "adapt",
            "/images",
            "--out",
            "/out/run",
            "--backbone",
            "test_vit",
            "--weights",
            "random",
            "--image-size",
            "32",
            "--steps",
            "2",
            "--batch-size",
            "8",
            "--workers",
            "0",
        ),
        ("export", "/out/run", "--out", "/out/bundle"),
    ):
        with Container(work, runtime_config(image, service, command, mounts)) as container:
            container.end(600)
    print("exported:", ", ".join(sorted(path.name for path in (out / "bundle").iterdir())), flush=True)


def main() -> None:
    """Build one target and prove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", default="bookworm", help="Debian's: bookworm has Python 3.11, trixie 3.13")
    targets = parser.add_subparsers(dest="target", required=True)
    serve = targets.add_parser("serve")
    serve.add_argument("bundle", type=Path)
    serve.add_argument("picture", type=Path, metavar="png")
    targets.add_parser("train").add_argument("images", type=Path)
    asked = parser.parse_args()
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["jepakit"]
    with tempfile.TemporaryDirectory(prefix="jepakit-prove-") as folder:
        work = Path(folder)
        work.chmod(0o755)  # the image's user reads its mounts in this folder
        image = Image(work, asked.target, asked.release)
        if asked.target == "serve":
            prove_serve(image, service, work, asked.bundle, asked.picture)
        else:
            prove_train(image, service, work, asked.images)


if __name__ == "__main__":
    main()
