#!/usr/bin/env bash
# Build the image.   Usage: container/build.sh [exec|invoke] [further arguments of `docker build`]
# ENGINE=podman uses podman; IMAGE=name:tag names the image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENGINE=${ENGINE:-docker}
API="exec"
if [[ "${1:-}" == exec || "${1:-}" == invoke ]]; then
    API=$1
    shift
fi
IMAGE=${IMAGE:-restormer3d:$API}

"$ENGINE" build --platform linux/amd64 --build-arg API_METHOD="$API" --file container/Dockerfile --tag "$IMAGE" "$@" .
echo "built $IMAGE"
