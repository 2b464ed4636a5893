#!/bin/sh
# run.sh NAME…: checks handshake.pv with these names defined (see its head).
# PROVERIF is the program, proverif if unset. Prints one line a query.
set -e
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
defines=
for name; do defines="$defines -D$name"; done
cpp -P -undef -nostdinc -w $defines handshake.pv >"$work/handshake.pv"
"${PROVERIF:-proverif}" "$work/handshake.pv" >"$work/out" || { tail "$work/out"; exit 1; }
grep -a '^RESULT' "$work/out"
