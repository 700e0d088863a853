"""Build the compiled kernels with sanitizers and run their tests: `make test-native`.

AddressSanitizer and UndefinedBehaviorSanitizer watch all of them. ThreadSanitizer watches those without JAX's threads,
which are not built for it: both kinds of threads take parts by the same code, `jaxdw/native/work.h`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = "tests/jaxdw/native"

#: The libraries to load first, and the tests, by sanitizer. An emulated processor runs another build, without one.
SANITIZERS = {
    "address,undefined": (
        ("libasan.so", "libubsan.so"),
        (TESTS, "-k", "not cannot_be_loaded and not environment and not emulated"),
    ),
    "thread": (("libtsan.so",), (f"{TESTS}/test_bits.py", "-k", "threads or instruction_set or documented_tree")),
}


def main() -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SystemExit("no C++ compiler: set CXX, or install g++")
    for name, (libraries, tests) in SANITIZERS.items():
        build = ROOT / "build" / f"native-{name.replace(',', '-')}"
        configure = ["cmake", "-S", str(ROOT / "jaxdw/native"), "-B", str(build), f"-DJAXDW_SANITIZE={name}"]
        subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", str(build), "-j", "2"], check=True, stdout=subprocess.DEVNULL)
        paths = [_run(compiler, f"-print-file-name={library}") for library in libraries]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join([*paths, _run(compiler, "-print-file-name=libstdc++.so.6")]),
            "JAXDW_NATIVE": str(build / "libjaxdw_kernels.so"),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves memory to the system
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        print(f"{name}:", flush=True)
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], check=True, env=environment, cwd=ROOT)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
