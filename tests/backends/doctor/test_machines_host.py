"""What has nothing to do with a GPU: packages, Python, processor, memory, disk, cache."""

from __future__ import annotations

from typing import Any

MIGRAPHX = "MIGraphXExecutionProvider"
NAN = {"shape_right": True, "finite": False, "cosine": 0.0, "relative_l2": 0.0}
WRONG = {"shape_right": True, "finite": True, "cosine": 0.83, "relative_l2": 0.6}

# Name, machine, troubles (``!``: a failure), what works, exit code: see machine_case in conftest.py.
CASES = [
    (
        "two ONNX Runtimes",
        lambda m: m.healthy_nvidia().package("onnxruntime", "1.31.1"),
        {"D-ORT-DUP": "!onnxruntime and onnxruntime-gpu overwrite|pip install onnxruntime-gpu"},
    ),
    (
        "two ONNX Runtimes beside a Radeon, the wrong one on top",
        lambda m: (
            m.healthy_amd()
            .package("onnxruntime", "1.31.1")
            .site_file("onnxruntime/capi/build_and_package_info.py", "package_name = 'onnxruntime'\n")
            .answer("onnxruntime-list", version="1.31.1", providers=["CPUExecutionProvider"], plugins=[])
        ),
        {"D-ORT-DUP": "!files that lie there are those of onnxruntime|pip install onnxruntime-migraphx"},
    ),
    (
        "two ONNX Runtimes in two folders",
        lambda m: m.openvino().onnxruntime("onnxruntime", "1.31.1").other_folder("onnxruntime_webgpu-1.27.0"),
        {"D-ORT-DUP": "on the search path 2 times; onnxruntime is used|PYTHONPATH"},
    ),
    (
        "MIGraphX without an AMD GPU",
        lambda m: m.migraphx().library_lacks(MIGRAPHX, "libmigraphx_c.so.3"),
        {
            "D-EP-LOAD": "!pip uninstall -y onnxruntime-migraphx|pip install onnxruntime",
            "D-EP-LIVE": "!fell back",
        },
        "onnxruntime",
    ),
    (
        "files of a wheel overwritten",
        lambda m: m.healthy_amd().answer(
            "onnxruntime-list", version="1.31.1", providers=["CPUExecutionProvider"], plugins=[]
        ),
        {"D-EP": "!should bring MIGraphXExecutionProvider|pip install --no-cache-dir onnxruntime-migraphx"},
    ),
    (
        "empty packages",
        lambda m: m.healthy_amd().package("migraphx", "0.0.1").package("onnxruntime-ep-migraphx", "0.0.0"),
        {"D-PLACEHOLDER": "migraphx 0.0.1|pip uninstall -y migraphx onnxruntime-ep-migraphx"},
    ),
    ("AMD's own migraphx package", lambda m: m.healthy_amd().package("migraphx", "2.16.0"), {}),
    ("old Python", lambda m: m.openvino().fact(python=[3, 10, 12]), {"D-PY": "!3.10.12 is too old|3.12"}),
    ("new Python", lambda m: m.openvino().fact(python=[3, 15, 0]), {"D-PY": "newer than the newest"}),
    (
        "an engine that does not load",
        lambda m: (
            m.openvino().torch_cpu().fails("torch-list", "error", "libtorch_cpu.so: invalid ELF header")
        ),
        {"D-LOAD": "!torch 2.11.0+cpu is installed but cannot be imported|invalid ELF header|torch==2.11.0"},
        "openvino:CPU",
    ),
    ("nothing installed", lambda m: m, {"D-KILN": "!no backend here|pip install"}, "", 2),
    (
        "an engine, and wrong numbers",
        lambda m: m.openvino().gives("openvino-run CPU fp32", WRONG).gives("openvino-run CPU half", NAN),
        {"D-NUM": "!"},
        "",
        2,
    ),
    ("no AVX2", lambda m: m.processor("ivy").openvino(), {"D-CPU": "no AVX2|--steps 8"}),
    (
        "no AVX2 in a virtual machine",
        lambda m: m.processor("sse4_2 hypervisor").openvino(),
        {"D-CPU": "no AVX2|-cpu host"},
    ),
    (
        "quota below one processor",
        lambda m: m.quota_v2("50000 100000").openvino(),
        {"D-CPU-LIMIT": "quota of 0.50 processors|docker update --cpus"},
    ),
    (
        "little memory",
        lambda m: m.memory(8, 3).openvino(),
        {"D-MEM": "3.0 GiB of memory available|--precision fp16"},
    ),
    ("hardly any memory", lambda m: m.memory(2, 0.5).openvino(), {"D-MEM": "!not even the bundled model"}),
    (
        "memory limit, version 2",
        lambda m: m.memory_v2(4, 1).openvino(),
        {"D-MEM": "3.0 GiB of memory|memory.max: limit 4.0 GiB|docker update --memory"},
    ),
    (
        "memory limit, version 1",
        lambda m: m.memory_v1(4).openvino(),
        {"D-MEM": "/memory/docker/memory.limit_in_bytes: limit 4.0 GiB"},
    ),
    (
        "full disk",
        lambda m: m.openvino().fact(disk={"free": 10**7, "type": "ext4"}),
        {"D-DISK": "!disk of the cache is full|export KILN_CACHE"},
    ),
    (
        "small disk",
        lambda m: m.openvino().fact(disk={"free": 3 * 10**9, "type": "ext4"}),
        {"D-DISK": "exporting Stable Diffusion 1.5 takes up to 4.9 GiB"},
    ),
    (
        "read-only cache",
        lambda m: m.openvino().fact(write_error="Read-only file system"),
        {"D-CACHE": "!cannot be used: Read-only file system|KILN_CACHE"},
    ),
    (
        "cache on NFS",
        lambda m: m.openvino().fact(disk={"free": 10**12, "type": "nfs4"}),
        {"D-CACHE": "network filesystem (nfs4)|/path/on/a/local/disk"},
    ),
    (
        "cache over ssh",
        lambda m: m.openvino().fact(disk={"free": 10**12, "type": "fuse.sshfs"}),
        {"D-CACHE": "fuse.sshfs"},
    ),
]


def test_machine(machine_case: Any) -> None:
    machine_case()
