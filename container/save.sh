#!/usr/bin/env bash
# Make the two files to upload: the image and the model.
# Usage: container/save.sh [exec|invoke] [WEIGHTS.safetensors]     (by default the weights in the package)
# ENGINE=podman uses podman; IMAGE=name:tag names the image; OUTPUT=FOLDER receives the files.
set -euo pipefail
ENGINE=${ENGINE:-docker}
API=${1:-exec}
if [[ ! "$API" =~ ^(exec|invoke)$ || $# -gt 2 ]]; then
    echo "usage: container/save.sh [exec|invoke] [WEIGHTS.safetensors]" >&2
    exit 2
fi
# Names that are given count from where the caller is, the others from here.
WEIGHTS=${2:+$(realpath "$2")}
[[ -z "${OUTPUT:-}" ]] || mkdir -p "$OUTPUT"
OUTPUT=${OUTPUT:+$(realpath "$OUTPUT")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WEIGHTS=${WEIGHTS:-src/restormer3d/data/restormer3d.safetensors}
IMAGE=${IMAGE:-restormer3d:$API}
OUTPUT=${OUTPUT:-dist}
mkdir -p "$OUTPUT"

# The model first: it takes a moment, and needs no container engine (SKIP_IMAGE=1 makes it alone).
[[ -f "$WEIGHTS" ]] || { echo "no weights at $WEIGHTS: name a file, as restormer3d pretrain writes it" >&2; exit 1; }
tar --create --gzip --owner=0 --group=0 --mode=a+r --file "$OUTPUT/model.tar.gz" \
    --directory "$(dirname "$WEIGHTS")" "$(basename "$WEIGHTS")"
echo "wrote $OUTPUT/model.tar.gz"
[[ -n "${SKIP_IMAGE:-}" ]] && exit

part="$OUTPUT/.image.part-$$"
trap 'rm -f "$part"' EXIT
"$ENGINE" save "$IMAGE" | gzip --stdout >"$part"
mv "$part" "$OUTPUT/restormer3d-$API.tar.gz"
echo "wrote $OUTPUT/restormer3d-$API.tar.gz"
