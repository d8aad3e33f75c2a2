"""The bundle format to the byte: one small episode, spelled out, and the digest of its file."""

from __future__ import annotations

import subprocess
from hashlib import sha256

from tests.factories.small_bundles import members_of, small_bundle
from tests.requirements import need_program

from phasewatch.bundle.archive import unpack_bundle
from phasewatch.bundle.container import decompress_frame

# Raise the format's number when one of these has to change: old readers would refuse the new bytes.
GOLDEN_TAR = "be81d252434da8904c9c43408243ed801452b5d084a1b7c94f3043a7208a55c6"
GOLDEN_LEVEL_3 = "8198d06644973e7bfbcc19c6c3056c34c33bf3d301977ffdbdcd8d1d6826f1c0"
# Version 1 is only read; the same episode in it, byte for byte as it was written then.
GOLDEN_TAR_1 = "96dbfda339726fd4de0e97a35123f35671b02564726b452b15f35d236232b5cc"

MANIFEST = (
    '{"format":"phasewatch-episode/2","episode_id":"0199c82c-c000-7000-8000-000000000001",'
    '"host":{"host_id":"pc-a","arch":"x86_64","accel":"tcg","machine":"pc","cpu":"qemu64","vcpus":1,"mem_mib":256,'
    '"disk":"virtio","nic":"virtio","hypervisor":"QEMU 7.2","guest_kernel":"6.1","recorder":"test"},'
    '"profile":"benign","sample_name":"idle","sample_kind":"benign","origin":"simulated","role":"lab",'
    '"started_wall_ns":1760000000000000000,"duration_s":2.0,"session":"s-1","neighbours":[],"plan_seed":7,'
    '"plan":[["clean",1.5],["armed",0.5]],"agent":false,"nominal_hz":{"proc":2.0},"rows_emitted":{"proc":4},'
    '"channels_available":["proc.cpu_user"],'
    '"fields":{"proc":["cpu_user_ns","cpu_sys_ns","vcpu_run_ns","vcpu_wait_ns","vcpu_vcs","vcpu_ics","main_run_ns",'
    '"main_vcs","aux_run_ns","io_rchar_bytes","io_wchar_net_bytes","io_write_bytes","rss_anon_bytes","rss_bytes",'
    '"threads"]},'
    '"clocks":{"base":{"proc":"unix"},'
    '"pairs":{"monotonic":[[5000000000,1760000000000000000],[7000000000,1760000002000000000]]}},"recording":null,'
    '"members":{"labels.jsonl":{"bytes":217,"sha256":"0693c63e4200492d95f9116d83d490360a10b1d618eca9464cfea8d72f2c62c3","rows":3},'
    '"proc.jsonl":{"bytes":1352,"sha256":"b3c25a77115a0763a45056b5056620d3112497f2aedc66212b7e3736fe3e5d38","rows":4}}}\n'
)
LABELS = (
    '{"t_wall_ns":1760000000000000000,"t_mono_ns":5000000000,"phase":"clean"}\n'
    '{"t_wall_ns":1760000001500000000,"t_mono_ns":6500000000,"phase":"armed"}\n'
    '{"t_wall_ns":1760000002000000000,"t_mono_ns":7000000000,"phase":"end"}\n'
)
SECOND_ROW = (
    '{"t_wall_ns":1760000000500000000,"t_mono_ns":5500000000,"seq":1,"cpu_user_ns":1,"cpu_sys_ns":101,'
    '"vcpu_run_ns":201,"vcpu_wait_ns":301,"vcpu_vcs":401,"vcpu_ics":501,"main_run_ns":601,"main_vcs":701,'
    '"aux_run_ns":801,"io_rchar_bytes":901,"io_wchar_net_bytes":1001,"io_write_bytes":1101,"rss_anon_bytes":1201,'
    '"rss_bytes":1301,"threads":1401}'
)


def test_the_members_of_the_golden_episode_are_these_lines() -> None:
    members = members_of(small_bundle())

    assert list(members) == ["manifest.json", "labels.jsonl", "proc.jsonl"]
    assert members["labels.jsonl"].decode() == LABELS
    assert members["proc.jsonl"].decode().splitlines()[1] == SECOND_ROW
    assert members["manifest.json"].decode() == MANIFEST


def test_the_tar_of_the_golden_episode_has_this_digest() -> None:
    assert sha256(decompress_frame(small_bundle(), file="")).hexdigest() == GOLDEN_TAR


def test_the_bundle_of_the_golden_episode_has_this_digest() -> None:
    # Bound to the zstd that constraints.txt pins: another version may find shorter bytes for the same content.
    assert sha256(small_bundle(level=3)).hexdigest() == GOLDEN_LEVEL_3


def test_an_episode_of_format_version_1_keeps_its_bytes() -> None:
    data = small_bundle(format="phasewatch-episode/1")

    assert sha256(decompress_frame(data, file="")).hexdigest() == GOLDEN_TAR_1
    assert unpack_bundle(data, file="").manifest.format == "phasewatch-episode/1"


def test_the_same_content_gives_the_same_bytes() -> None:
    assert small_bundle() == small_bundle()


def test_every_level_reads_back_as_the_same_episode() -> None:
    episodes = [unpack_bundle(small_bundle(level), file="small") for level in (1, 3, 15, 19)]

    assert all(episode.manifest == episodes[0].manifest for episode in episodes)


def test_ordinary_tools_read_a_bundle(tmp_path) -> None:
    need_program("zstdcat", "zstd")
    file = tmp_path / "x.tar.zst"
    file.write_bytes(small_bundle())

    tar = subprocess.run(["zstdcat", file], capture_output=True, check=True)
    out = subprocess.run(["tar", "-xO", "labels.jsonl"], input=tar.stdout, capture_output=True, check=True)

    assert out.stdout.decode() == LABELS
    assert out.stderr == b""
