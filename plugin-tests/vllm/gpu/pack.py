"""Makes the bundle that takes vLLM to a machine that has a GPU and PyTorch, and no network.

    target/venv/bin/python plugin-tests/vllm/gpu/pack.py <machine> <out> [--softefa <softefa-env> --efa-libfabric <folder>]

    <machine>   what probe.py printed there, or a list of its packages by hand
    <out>       the folder for the bundle: bundle.00, bundle.01, ... and unpack.sh, which puts them together there

In it: the vLLM that goes with the machine's PyTorch; its dependencies that the machine lacks; NIXL with UCX; our plugin and
program, of `make plugin`; these tests. What the engines of the tests never load is left out (LEFT_OUT, DROPPED, BLANKED): one
trip of some 50 MB in place of 0.8 GB. With --softefa and --efa-libfabric the cases on software EFA devices, too, as in
plugin-tests/gpu/pack.sh.
"""

import argparse
import fnmatch
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fatbin  # noqa: E402
import setup  # noqa: E402

ROOT = setup.ROOT
PART_BYTES = 60 << 20
NIXL = ["nixl==1.5.0", "nixl-cu13==1.5.0"]

# Kernels, and readers of weights and films, that a Llama with attention by Triton has no use for. vLLM looks whether they are there.
LEFT_OUT = {
    "flashinfer-python": "kernels", "tilelang": "kernels", "nvidia-cutlass-dsl": "kernels", "quack-kernels": "kernels",
    "tokenspeed-mla": "kernels", "humming-kernels": "kernels", "nvidia-cudnn-frontend": "kernels", "nvtx": "marks for a profiler",
    "pynvvideocodec": "films", "torchcodec": "films", "fastsafetensors": "weights", "fastapi-cloud-cli": "a hosting service",
}
# Files of what is in the bundle, by their path under its site-packages.
DROPPED = [
    "vllm/vllm-rs", "vllm/_flashmla*", "vllm/_qutlass*", "vllm/vllm_flash_attn/_vllm_fa3_C*", "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*", "vllm/third_party/tml_fa4/*", "vllm/kernels/helion/configs/*", "vllm/*.jpg", "vllm/*.png",
    "vllm/*/static/*", "pycountry/locales/*", "bin/*", "*.lib", "*.a", "*.pyi",
]
# Libraries of vLLM that are imported, and the GPU code that they keep: all that is called is built for each architecture.
BLANKED = {
    "vllm/_C_stable_libtorch.abi3.so": True, "vllm/_moe_C_stable_libtorch.abi3.so": True,
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": False,
}
# Of NIXL, what its Python bindings and UCX's plugin link; UCX opens its transports by name.
NIXL_ROOTS = ["nixl_cu13/*.so", ".nixl_cu13.mesonpy.libs/plugins/libplugin_UCX.so", "nixl_cu13.libs/ucx/*.so.0*"]
NIXL_NEVER = ["*perftest*", "*mlx5_gdp*"]
SOURCES = ["plugin-tests/vllm", "plugin-tests/e2e/bed", "plugin-tests/setup"]


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


class Machine:
    """What probe.py has seen: versions by package (None: not known), and the facts in its comments."""

    def __init__(self, path):
        self.packages, self.facts = {}, {"python": "3.12", "glibc": "2.39", "gpu": "90"}
        for line in path.read_text().split("\n"):
            if fact := re.match(r"# (\w+) (\S+)", line):
                self.facts[fact[1]] = fact[2]
            elif line.strip() and not line.startswith("#"):
                name, _, version = line.strip().partition("==")
                self.packages[plain(name)] = version.partition("+")[0] or None
        if not self.packages.get("torch"):
            raise SystemExit(f"pack: {path} has no line torch==<version>: vLLM is chosen by it")

    def target(self):
        """uv's options for it."""
        return ["--python-version", self.facts["python"], "--python-platform", "x86_64-manylinux_" + self.facts["glibc"].replace(".", "_")]


def resolve(machine, folder):
    """What vLLM needs on this machine, {package: version}: the newest vLLM that takes its PyTorch."""
    torch = machine.packages["torch"]
    (folder / "wanted.txt").write_text("vllm\n")
    (folder / "torch.txt").write_text(f"torch=={torch}\n")
    given = [f"{name}=={version}" for name, version in machine.packages.items() if version and name != "torch"]
    (folder / "given.txt").write_text("\n".join([*given, *(f"{name} ; python_version < '3'" for name in LEFT_OUT)]) + "\n")
    setup.uv("pip", "compile", "--quiet", "--no-header", "--no-annotate", "--constraint", folder / "torch.txt", "--override",
             folder / "given.txt", *machine.target(), folder / "wanted.txt", "--output-file", folder / "closure.txt")
    lines = (folder / "closure.txt").read_text().split()
    return dict(line.split("==") for line in lines if "==" in line)


def install(machine, closure, site):
    missing = [f"{name}=={version}" for name, version in closure.items() if name not in machine.packages]
    setup.uv("pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", site, *machine.target(), *missing, *NIXL)
    return missing


# What is cut


def trim(site):
    for path in sorted(site.rglob("*")):
        name = str(path.relative_to(site))
        if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in DROPPED):
            path.unlink()


def blank(site, gpu):
    for name, keeps in BLANKED.items():
        before, after = fatbin.blank(site / name, {int(gpu)} if keeps else set())
        print(f"pack: {name}: {before >> 20} MiB of GPU code, {after >> 20} MiB kept")


def trim_nixl(site):
    roots = [path for pattern in NIXL_ROOTS for path in site.glob(pattern)]
    kept = {path.resolve() for path in roots}
    for root in roots:
        listing = subprocess.run(["ldd", root], capture_output=True, text=True).stdout
        found = {Path(path).resolve() for path in re.findall(r"=> (/\S+)", listing)}
        kept |= {path for path in found if path.is_relative_to(site.resolve())}
    for folder in ("nixl_cu13", "nixl_cu13.libs", ".nixl_cu13.mesonpy.libs", "nixl_ep_cu13", "nixl_cu13.scripts"):
        for path in sorted((site / folder).rglob("*")):
            never = any(fnmatch.fnmatch(path.name, pattern) for pattern in NIXL_NEVER)
            if path.is_file() and path.suffix != ".py" and (path.resolve() not in kept or never):
                path.unlink()


# Whether it is whole


def unmet(machine, site):
    """Lines about requirements of what is in the bundle that neither it nor the machine meets, as their metadata say."""
    environment = default_environment() | {"python_version": "3.12", "python_full_version": machine.facts["python"], "extra": ""}
    here, requirements = {}, []
    for metadata in site.glob("*.dist-info/METADATA"):
        head = metadata.read_text(errors="replace").split("\n\n", 1)[0]
        (name,), (version,) = re.findall(r"^Name: (.*)$", head, re.M), re.findall(r"^Version: (.*)$", head, re.M)
        here[plain(name)] = version
        requirements += [(plain(name), Requirement(text)) for text in re.findall(r"^Requires-Dist: (.*)$", head, re.M)]
    lines = []
    for package, requirement in requirements:
        name = plain(requirement.name)
        if (requirement.marker and not requirement.marker.evaluate(environment)) or name in LEFT_OUT:
            continue
        if package == "nixl" and name.startswith("nixl-cu"):
            continue  # the shim takes whichever is there
        version = here.get(name, machine.packages.get(name, ""))
        if version == "":
            lines.append(f"{package} needs {requirement}: not there")
        elif version and not requirement.specifier.contains(version, prereleases=True):
            lines.append(f"{package} needs {requirement}: {version} {'here' if name in here else 'on the machine'}")
    return here, sorted(lines)


# The bundle


def add_ours(bundle):
    plugins = bundle / "target" / "plugins"
    plugins.mkdir(parents=True)
    shutil.copy(ROOT / "target" / "plugins" / "libplugin_LIBFABRIC.so", plugins)
    (bundle / "bin").mkdir()
    shutil.copy(ROOT / "target" / "release" / "nixl-libfabric", bundle / "bin")
    for file in (plugins / "libplugin_LIBFABRIC.so", bundle / "bin" / "nixl-libfabric"):
        subprocess.run(["strip", file], check=True)
    for source in SOURCES:
        shutil.copytree(ROOT / source, bundle / source, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Cargo.toml", bundle)


def add_softefa(bundle, program, libfabric):
    """The layout of plugin-tests/gpu/pack.sh."""
    libraries = bundle / "softefa" / "softefa-lib"
    libraries.mkdir(parents=True)
    shutil.copy(program, bundle / "softefa" / "softefa-env")
    for library in ("libibverbs.so.1", "libefa.so.1", "libsoftefa.so"):
        shutil.copy(program.parent / "softefa-lib" / library, libraries)
    for file in (bundle / "softefa" / "softefa-env", libraries / "libsoftefa.so"):
        subprocess.run(["strip", "--strip-debug", file], check=True)
    (bundle / "libfabric-efa").mkdir()
    shutil.copy(libfabric / "libfabric.so.1", bundle / "libfabric-efa")


def write(bundle, out):
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("bundle.*"), *out.glob("unpack.sh")]:
        old.unlink()
    whole = out / "bundle.tar.xz"
    names = sorted(path.name for path in bundle.iterdir())
    subprocess.run(f"tar -C '{bundle}' --sparse --sort=name --owner=0 --group=0 -cf - {' '.join(names)} | xz -T0 -9 >'{whole}'",
                   shell=True, check=True)
    sums = []
    with open(whole, "rb") as archive:
        while piece := archive.read(PART_BYTES):
            part = out / f"bundle.{len(sums):02}"
            part.write_bytes(piece)
            sums.append(f"{hashlib.sha256(piece).hexdigest()}  {part.name}")
    whole.unlink()
    (out / "bundle.sha256").write_text("\n".join(sums) + "\n")
    shutil.copy(HERE / "unpack.sh", out)
    return [out / line.split()[1] for line in sums]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--softefa", type=Path, help="softefa-env of a release build that was run once")
    parser.add_argument("--efa-libfabric", type=Path, help="folder of a libfabric.so.1 with provider efa and CUDA")
    options = parser.parse_args()
    machine = Machine(options.machine)
    setup.FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setup.FOLDER) as folder:
        folder = Path(folder)
        bundle = folder / "bundle"
        site = bundle / "site"
        closure = resolve(machine, folder)
        print(f"pack: vLLM {closure['vllm']} goes with torch {machine.packages['torch']}", flush=True)
        missing = install(machine, closure, site)
        here, lines = unmet(machine, site)
        print(f"pack: {len(closure)} packages, {len(missing)} of them not on the machine: {' '.join(missing)}")
        for line in lines:
            print(f"pack: note: {line}")
        trim(site)
        trim_nixl(site)
        blank(site, machine.facts["gpu"])
        add_ours(bundle)
        if options.softefa:
            add_softefa(bundle, options.softefa, options.efa_libfabric)
        parts = write(bundle, options.out)
    for part in parts:
        print(f"pack: {part}: {part.stat().st_size / 1e6:.1f} MB")
    return 1 if any(line.endswith("not there") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
