"""A real libvirtd with real domains, taps and users. Run in `unshare --pid --mount --net`, with folders of its own.

Boots one small guest with an odd name, keeps a second one paused, and watches them in turn: as root while the domain
is suspended, resumed and reset and libvirtd is restarted; as QEMU's own user; and as a user of the group libvirt.
Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from phasewatch.lab.campaign import default_cache
from phasewatch.lab.guest_image import build_guest_image
from phasewatch.telemetry.libvirt_client import load_libvirt_binding

EDGE = Path(__file__).parents[2] / "corpus" / "lab-v1.edge.zip"
NAME = "web 01 \"ü'"
IMAGES = Path("/var/lib/libvirt/images")
BRIDGE = "pwbr0"
FOLDERS = ("/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>96</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{images}/kernel</kernel><initrd>{images}/initrd</initrd><cmdline>console=ttyS0 quiet</cmdline></os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='{images}/{disk}.qcow2'/><target dev='vda' bus='virtio'/></disk>
    <interface type='bridge'><source bridge='{bridge}'/><model type='virtio'/></interface>
    <serial type='null'><target port='0'/></serial>
    <memballoon model='virtio'/>
  </devices>
</domain>
"""
# The interpreter and this checkout may lie where other users cannot look; the capability opens no file of /proc/PID.
READ_FILES = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")


def log(step: str) -> None:
    print(time.strftime("%H:%M:%S"), step, file=sys.stderr, flush=True)


def sh(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise SystemExit("waited in vain")
        time.sleep(0.1)


def make_private_folders() -> None:
    """Hide the host's libvirt: copies of its folders in memory, and a configuration that needs no other daemon."""
    for folder in FOLDERS:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as copy:
            sh("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", copy)
            sh("cp", "-a", f"{folder}/.", copy)
            sh("mount", "--bind", copy, folder)
            sh("umount", "--lazy", copy)
    for leftover in ("/run/libvirt", "/etc/libvirt/qemu", "/var/lib/libvirt/images", "/var/lib/libvirt/qemu"):
        sh("find", leftover, "-mindepth", "1", "!", "-type", "d", "-delete")
    access = 'auth_unix_ro = "none"\nauth_unix_rw = "none"\nunix_sock_group = "libvirt"\nunix_sock_ro_perms = "0777"\n'
    Path("/etc/libvirt/libvirtd.conf").write_text(access)
    quiet = 'security_driver = "none"\nstdio_handler = "file"\ncgroup_controllers = []\nnamespaces = []\n'
    Path("/etc/libvirt/qemu.conf").write_text(quiet)


class Daemon:
    """The libvirt daemon."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        none = subprocess.DEVNULL
        self.child = subprocess.Popen(["/usr/sbin/libvirtd"], stdin=none, stdout=none, stderr=none)
        wait_for(
            lambda: subprocess.run(["virsh", "-r", "-q", "list"], check=False, capture_output=True).returncode == 0
        )

    def stop(self) -> None:
        self.child.terminate()
        self.child.wait()


def start_domains(folder: Path) -> None:
    image = build_guest_image(default_cache(), "x86_64")
    assert image.kernel is not None
    assert image.initrd is not None
    IMAGES.mkdir(exist_ok=True)
    for file, name in ((image.kernel, "kernel"), (image.initrd, "initrd")):
        (IMAGES / name).write_bytes(file.read_bytes())
    for number, name in enumerate((NAME, "paused")):
        disk = str(IMAGES / f"disk{number}.qcow2")
        sh("qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
        log(name)
        sh("chown", "libvirt-qemu:libvirt-qemu", disk)
        text = DOMAIN.format(name=escape(name), images=IMAGES, disk=f"disk{number}", bridge=BRIDGE)
        (folder / "domain.xml").write_text(text)
        sh("virsh", "-q", "define", str(folder / "domain.xml"))
        sh("virsh", "-q", "start", name, *(["--paused"] if number else []))


def watch(seconds: float, *, user: str = "", group: str = "", meanwhile: Callable[[], None] | None = None) -> Any:
    """Watch the first domain; return the exit code, the result, the number of decisions and what stderr says."""
    words = [sys.executable, "-m", "phasewatch", "watch", "--name", NAME, "--model", str(EDGE)]
    words += ["--seconds", str(seconds), "--json"]
    if user:
        words = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups", *READ_FILES, *words]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(words, stdout=out, stderr=err)
        if meanwhile is not None:
            wait_for(lambda: os.fstat(out.fileno()).st_size > 0)
            meanwhile()
        child.wait(300)
        out.seek(0)
        err.seek(0)
        lines, said = [json.loads(line) for line in out], err.read()
    result = next((line["result"] for line in lines if "result" in line), None)
    n_phases = sum(line.get("type") == "phase" for line in lines)
    return {"code": child.returncode, "result": result, "n_phases": n_phases, "err": said}


def describe_domain() -> list[str]:
    """Return what must be the same before and after a watch."""
    pid = sh("pgrep", "-f", "guest=web").split()[0]
    libvirt = load_libvirt_binding()
    connection = libvirt.openReadOnly("qemu:///system")
    domain = connection.lookupByName(NAME)
    text = Path(f"/var/log/libvirt/qemu/{NAME}.log").read_text()
    return [pid, domain.XMLDesc(), str(domain.state()), str(text.count("tainted"))]


def main() -> None:
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    sh("ip", "link", "set", BRIDGE, "up")
    make_private_folders()
    log("libvirtd")
    daemon = Daemon()
    log("domains")
    with tempfile.TemporaryDirectory() as folder:
        start_domains(Path(folder))
    log("watch")

    def disturb() -> None:
        for command in ("suspend", "resume", "reset"):
            time.sleep(4)
            sh("virsh", "-q", command, NAME)
        time.sleep(4)
        daemon.stop()
        time.sleep(4)
        daemon.start()

    found: dict[str, Any] = {"root": watch(75, meanwhile=disturb)}
    before = describe_domain()
    log("watch as QEMU's user")
    found["qemu"] = watch(14, user="libvirt-qemu", group="libvirt-qemu")
    log("watch as another user")
    found["group"] = watch(14, user="nobody", group="libvirt")
    found["is_unchanged"] = describe_domain() == before
    sh("virsh", "-q", "destroy", NAME)
    sh("virsh", "-q", "destroy", "paused")
    daemon.stop()
    print(json.dumps(found))


def reap_until_the_end(child: int) -> int:
    """Be the first process of the namespace: collect every process that ended; return the exit code of one of them."""
    while True:
        pid, status = os.wait()  # libvirtd waits for ever for a QEMU that nobody collects
        if pid == child:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    if os.getpid() != 1:
        raise SystemExit("to be run as the first process of a PID namespace, in which no other VM exists")
    if child := os.fork():
        raise SystemExit(reap_until_the_end(child))
    main()
