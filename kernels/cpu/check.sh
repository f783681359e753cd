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
if has asimddp; then
    build neon "$cxx" vector_neon.h -march=armv8.2-a+dotprod && compare neon "$out/neon"
    best=vector_neon.h best_flags=-march=armv8.2-a+dotprod
elif command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    build neon aarch64-linux-gnu-g++ vector_neon.h -static -march=armv8.2-a+dotprod
    compare neon-in-qemu qemu-aarch64 "$out/neon"
else
    echo "neon: not run; it takes g++-aarch64-linux-gnu and qemu-user"
fi
build address "$cxx" $best $best_flags -g -fsanitize=address,undefined -fno-sanitize-recover=all
compare address-and-undefined-sanitizer "$out/address"
build thread "$cxx" $best $best_flags -g -fsanitize=thread
"$out/thread" "$cases" 4 2 >/dev/null
echo "thread-sanitizer: $cases cases on 2 to 4 threads, equal to one thread's, nothing reported"
