"""Build the sdist and the wheels of a release, install each into an empty environment, and check what a stranger gets.

What this machine cannot check is said at the end; .github/workflows/release.yml does it on machines that can.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST, WORK = ROOT / "dist", ROOT / "target" / "release-check"
TOOLS = Path(sys.executable).parent
LARGEST = 3_000_000  # bytes of a wheel
LICENSES = "THIRD_PARTY_LICENSES.txt"
SNIPPET = "from safelora_fast import project_adapter, _core\nreveal_type(project_adapter)\nreveal_type(_core.kernel_level())\n"
left_out = []


def run(*command: object, at: Path = ROOT, **variables: str) -> str:
    """Run a command; return its output, or end with its errors."""
    done = subprocess.run(
        list(map(str, command)), cwd=at, env={**os.environ, **variables}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def build() -> None:
    """Build the sdist, the wheel for x86-64, and the one for aarch64 where a standard library for it can be had."""
    shutil.rmtree(DIST, ignore_errors=True)
    maturin = (TOOLS / "maturin", "build", "--release", "--zig", "--compatibility", "manylinux_2_17", "--out", DIST)
    run(TOOLS / "maturin", "sdist", "--out", DIST)
    run(*maturin, "--target", "x86_64-unknown-linux-gnu")
    found = subprocess.run([str(ROOT / ".ci" / "aarch64")], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        left_out.append(f"the aarch64 wheel: {found.stderr.strip().splitlines()[-1]}")
    else:
        target = WORK / "aarch64"  # another rustc: another folder
        rustc = found.stdout.strip()
        run(*maturin, "--target", "aarch64-unknown-linux-gnu", RUSTC=rustc, CARGO_TARGET_DIR=str(target))
        left_out.append("the aarch64 wheel was built, and not run: this machine is x86-64")
    left_out.append("macOS: no wheel, because no machine here links for it; the sdist builds there with Rust")


def check_sdist() -> None:
    """Build the wheel from the sdist with vendored crates and an empty cargo home, so nothing can be fetched."""
    folder = WORK / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(next(DIST.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run("cargo", "vendor", "--locked", "--versioned-dirs", "vendor", at=source)
    (source / ".cargo").mkdir()
    replaced = '[source.crates-io]\nreplace-with = "vendored"\n[source.vendored]\ndirectory = "vendor"\n'
    (source / ".cargo" / "config.toml").write_text(replaced, encoding="utf-8")
    home = {"CARGO_HOME": str(folder / "home"), "CARGO_NET_OFFLINE": "true", "CARGO_TARGET_DIR": str(WORK / "offline")}
    run(TOOLS / "maturin", "build", "--profile", "dev", "--out", folder / "dist", at=source, **home)
    wheels = [next(place.glob("*x86_64.whl")) for place in (DIST, folder / "dist")]
    ours, theirs = (set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels)
    if missing := {name for name in ours - theirs if "/sboms/" not in name}:
        sys.exit(f"the sdist lacks what becomes {', '.join(sorted(missing))}")


def check_files() -> None:
    """Check metadata, contents, ABI, licenses, size and workflows."""
    wheels = sorted(DIST.glob("*.whl"))
    run(TOOLS / "validate-pyproject", "pyproject.toml")
    run(TOOLS / "cffconvert", "--validate")
    run(TOOLS / "twine", "check", "--strict", *wheels, *DIST.glob("*.tar.gz"))
    run(TOOLS / "check-wheel-contents", *wheels)
    run(TOOLS / "abi3audit", "--strict", *wheels)
    run(TOOLS / "zizmor", "--offline", "--pedantic", ".github")
    if (TOOLS / "actionlint").exists():
        run(TOOLS / "actionlint")
    else:
        left_out.append("actionlint: its package downloads a program, and could not; the CI workflow runs it")
    if "UNKNOWN" in (ROOT / LICENSES).read_text("utf-8"):
        sys.exit(f"{LICENSES}: a crate has no license text")
    for wheel in wheels:
        if wheel.stat().st_size > LARGEST:
            sys.exit(f"{wheel.name} has {wheel.stat().st_size / 1e6:.1f} MB, at most {LARGEST / 1e6:.0f} are wanted")
        names = zipfile.ZipFile(wheel).namelist()
        for wanted in (
            f"/licenses/{LICENSES}",
            "/licenses/LICENSE",
            "safelora_fast/py.typed",
            "safelora_fast/_core.pyi",
        ):
            if not any(name.endswith(wanted) for name in names):
                sys.exit(f"{wheel.name} lacks {wanted}")
        print(f"  {wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(names)} files")


def check_licenses() -> None:
    """Check that the committed licenses are those of the crates in Cargo.lock."""
    about = shutil.which("cargo-about") or shutil.which("cargo-about", path=str(ROOT / "target/tools/bin"))
    if about is None:
        print("  compiling cargo-about: a few minutes", flush=True)
        run(
            "cargo",
            "install",
            "cargo-about",
            "--locked",
            "--version",
            "0.9.3",
            "--features",
            "cli",
            "--root",
            "target/tools",
        )
        about = str(ROOT / "target/tools/bin/cargo-about")
    new = WORK / LICENSES
    run(
        about, "generate", "--offline", "--locked", "--fail", "--manifest-path", "rust/python/Cargo.toml",
        "--config", ".ci/about.toml", "--output-file", new, ".ci/about.hbs",
    )  # fmt: skip
    if "--write" in sys.argv:
        shutil.copy(new, ROOT / LICENSES)
    elif new.read_text("utf-8") != (ROOT / LICENSES).read_text("utf-8"):
        sys.exit(f"{LICENSES} is not that of Cargo.lock: make licenses")


def pythons() -> list[str]:
    """Return the oldest and the newest Python from 3.10 on that run here, on the path or by pyenv."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for minor in range(10, 20):
        path = os.pathsep.join([*map(str, pyenv.glob(f"3.{minor}.*/bin")), os.environ["PATH"]])
        program = shutil.which(f"python3.{minor}", path=path)
        command = [program or "false", "-c", "import sys, venv; print('3.%d' % sys.version_info[1])"]
        if program and subprocess.run(command, capture_output=True, text=True, check=False).stdout == f"3.{minor}\n":
            found[minor] = program
    if not found or min(found) != 10:
        left_out.append(f"Python 3.10 is not here; the oldest is 3.{min(found, default=0)}")
    return [found[minor] for minor in sorted({min(found), max(found)})]


def check_installed() -> None:
    """Install the wheel into empty environments, alone and with the extras of training, and use it."""
    wheel = next(DIST.glob("*x86_64.whl"))
    for python in pythons():
        for extras in ("", "[train,plot,gate]"):
            folder = WORK / "environment"
            run(TOOLS / "uv", "venv", "--quiet", "--clear", "--python", python, folder)
            uv = {"VIRTUAL_ENV": str(folder), "UV_LINK_MODE": "hardlink", "UV_CACHE_DIR": str(WORK / "uv")}
            run(TOOLS / "uv", "pip", "install", "--quiet", f"{wheel}{extras}", **uv)
            plain = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
            said = run(folder / "bin" / "python", ROOT / ".ci" / "smoke_test.py", ROOT / "examples", at=WORK, **plain)
            print(f"  {said.strip()}", flush=True)
    run(TOOLS / "uv", "pip", "install", "--quiet", "mypy", **uv)
    (WORK / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    typed = run(folder / "bin" / "python", "-m", "mypy", "--strict", "snippet.py", at=WORK, **plain)
    if "Any" in typed or typed.count("Revealed type") != 2:
        sys.exit(f"the types of the installed package are not seen:\n{typed}")


def main() -> None:
    """Run the checks, or with `--write` only renew the licenses."""
    WORK.mkdir(parents=True, exist_ok=True)
    steps = [check_licenses, build, check_files, check_installed, check_sdist]
    for step in steps[:1] if "--write" in sys.argv else steps:
        print(re.sub(r":.*", "", (step.__doc__ or "").splitlines()[0]).rstrip("."), flush=True)
        step()
    for line in left_out:
        print(f"not checked here: {line}")


if __name__ == "__main__":
    main()
