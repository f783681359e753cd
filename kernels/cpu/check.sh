#!/bin/sh
# The same random layers on every instruction set that runs here, each with the digests of the scalar engine's results;
# then under AddressSanitizer, and on several threads under ThreadSanitizer. NEON runs in qemu-user where Debian's
# g++-aarch64-linux-gnu and qemu-user are installed.
#   check.sh [CASES]
set -eu
cases=${1:-60}
here=$(dirname "$0")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cxx=${CXX:-g++}
flags="-std=c++17 -O2 -ffp-contract=off -fno-math-errno -w -pthread"
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"

has() { grep -qw "$1" /proc/cpuinfo; }

build() { # NAME COMPILER HEADER FLAGS...
    name=$1 compiler=$2 header=$3
    shift 3
    $compiler $flags "$@" "-DSVDQ_VECTOR=\"$header\"" "$here/check.cpp" -o "$out/$name"
}

compare() { # NAME COMMAND...
    name=$1
    shift
    "$@" "$cases" >"$out/$name.txt"
    if cmp -s "$out/scalar.txt" "$out/$name.txt"; then
        echo "$name: $cases cases equal the scalar engine's to the bit"
    else
        echo "$name: differs from the scalar engine, first in case $(diff "$out/scalar.txt" "$out/$name.txt" | sed -n 2p)"
        exit 1
    fi
}

build scalar "$cxx" vector_scalar.h
"$out/scalar" "$cases" >"$out/scalar.txt"
best=vector_scalar.h best_flags=
if has avx2; then
    build avx2 "$cxx" vector_avx2.h $avx2 && compare avx2 "$out/avx2"
    best=vector_avx2.h best_flags=$avx2
fi
if has avx_vnni; then build avx-vnni "$cxx" vector_avx2.h $avx2 -mavxvnni && compare avx-vnni "$out/avx-vnni"; fi
if has avx512_vnni; then
    build avx512-vnni "$cxx" vector_avx512.h $avx512 && compare avx512-vnni "$out/avx512-vnni"
    best=vector_avx512.h best_flags=$avx512
fi
if has avx512_bf16; then
    build avx512-bf16 "$cxx" vector_avx512.h $avx512 -mavx512bf16 && compare avx512-bf16 "$out/avx512-bf16"
    best_flags="$avx512 -mavx512bf16"
fi
dotprod=-march=armv8.2-a+dotprod
if has asimddp; then
    build neon-dotprod "$cxx" vector_neon.h $dotprod && compare neon-dotprod "$out/neon-dotprod"
    best=vector_neon.h best_flags=$dotprod
    if has i8mm; then
        build neon-i8mm "$cxx" vector_neon.h $dotprod+i8mm && compare neon-i8mm "$out/neon-i8mm"
        best_flags=$dotprod+i8mm
    fi
elif command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    build neon-dotprod aarch64-linux-gnu-g++ vector_neon.h -static $dotprod
    compare neon-dotprod-in-qemu qemu-aarch64 "$out/neon-dotprod"
    build neon-i8mm aarch64-linux-gnu-g++ vector_neon.h -static $dotprod+i8mm
    compare neon-i8mm-in-qemu qemu-aarch64 -cpu max "$out/neon-i8mm"
else
    echo "neon-dotprod, neon-i8mm: not run; they take g++-aarch64-linux-gnu and qemu-user"
fi
build address "$cxx" $best $best_flags -g -fsanitize=address,undefined -fno-sanitize-recover=all
compare address-and-undefined-sanitizer "$out/address"
build thread "$cxx" $best $best_flags -g -fsanitize=thread
"$out/thread" "$cases" 4 2 >/dev/null
echo "thread-sanitizer: $cases cases on 2 to 4 threads, equal to one thread's, nothing reported"
