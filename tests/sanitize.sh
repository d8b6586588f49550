#!/bin/sh
# The kernel tests under AddressSanitizer and UBSan, built in a temporary copy of the sources: those
# of the CPU, and those of the GPU on the emulator.
#
#     tests/sanitize.sh [python] [pytest arguments]
#
# The pool keeps nothing in such a build, so that each array ends where it ends and dies when it dies.
set -eu
python=${1:-python3}
[ $# -gt 0 ] && shift
here=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

mkdir -p "$copy/tinylm" "$copy/tests"
cp -r "$here/setup.py" "$here/csrc" "$copy"
cp -r "$here/tinylm/kernels" "$here/tinylm/selfcheck.py" "$copy/tinylm"
cp -r "$here/csrc/cuda" "$copy/tinylm/_cuda"
rm -f "$copy"/tinylm/kernels/_cpu.*
touch "$copy/tinylm/__init__.py"
for test in test_kernels.py test_cuda.py emulator.py emulator.h device_arrays.py nvrtc.py; do
    cp "$here/tests/$test" "$copy/tests"
done
cd "$copy"

export TINYLM_SANITIZE=address,undefined
"$python" setup.py -q build_ext --inplace 2>build.log || { cat build.log; exit 1; }
sanitized() {
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        PYTHONPATH="$copy:$copy/tests" "$python" -m pytest -q -p no:cacheprovider "$@"
}
sanitized "$@" tests/test_kernels.py
sanitized "$@" tests/test_cuda.py -k "not large and not compiles and not barrier"
