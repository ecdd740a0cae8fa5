#!/usr/bin/env bash
# Run the image as the platform does and check what it writes.
# Usage: container/test.sh [exec|invoke] [STACK.tif]     (by default a crop of the recording inside the package)
#
# No network, /input and the model read-only, an empty /tmp, no other folder that can be written, no rights.
# ENGINE=podman uses podman; IMAGE=name:tag names the image; GPUS='--gpus all' lends the GPUs; MODEL=FOLDER holds the
# weights; ARGUMENTS='--time-limit 10' are handed to the program. Nothing is pulled from a registry.
set -euo pipefail
ENGINE=${ENGINE:-docker}
API=${1:-exec}
if [[ ! "$API" =~ ^(exec|invoke)$ || $# -gt 2 ]]; then
    echo "usage: container/test.sh [exec|invoke] [STACK.tif]" >&2
    exit 2
fi
IMAGE=${IMAGE:-restormer3d:$API}
# Names that are given count from where the caller is, the others from here.
STACK=${2:+$(realpath "$2")}
MODEL=${MODEL:+$(realpath "$MODEL")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STACK=${STACK:-src/restormer3d/data/fmi_mouse_gcamp_192x96x96.tif}
SOCKET=images/stacked-neuron-images-with-noise
RESULT=images/stacked-neuron-images-with-reduced-noise
read -r -a gpus <<<"${GPUS:-}"
# Two jobs are to give the same: for that, the iterations have to be few enough for no limit to reduce them.
usual="--time-limit 10"
[[ "$API" == exec ]] || usual+=" --iterations 25"
read -r -a arguments <<<"${ARGUMENTS:-$usual}"

label=$("$ENGINE" image inspect --format '{{index .Config.Labels "org.grand-challenge.api-method"}}' "$IMAGE") ||
    { echo "the image $IMAGE cannot be looked at: container/build.sh $API makes it" >&2; exit 1; }
[[ "$label" == "$API" ]] || { echo "the image's label says '$label', expected '$API'" >&2; exit 1; }

work=$(mktemp -d)
container="restormer3d-test-$$"
cleanup() {
    "$ENGINE" rm --force "$container" >/dev/null 2>&1 || true
    # what the container's user wrote is removed by that user
    "$ENGINE" run --rm --pull never --network none --volume "$work/output:/output" --entrypoint /bin/sh "$IMAGE" \
        -c 'rm -rf /output/*' || true
    rm -rf "$work"
}
trap cleanup EXIT

mkdir -p "$work/input/$SOCKET" "$work/output" "$work/model"
cp "$STACK" "$work/input/$SOCKET/"
if [[ -n "${MODEL:-}" ]]; then
    cp -r "$MODEL/." "$work/model/"
else
    cp src/restormer3d/data/restormer3d.safetensors "$work/model/"
fi
cat >"$work/input/inputs.json" <<JSON
[{"socket": {"slug": "stacked-neuron-images-with-noise", "relative_path": "$SOCKET"}}]
JSON
chmod -R a+rX "$work"
chmod a+rwx "$work/output"

options=(
    --pull never --name "$container" --platform linux/amd64 --network none --read-only --cap-drop ALL
    --tmpfs "/tmp:rw,exec,size=16g,mode=1777" --shm-size 2g ${gpus[@]+"${gpus[@]}"}
    --volume "$work/input:/input:ro" --volume "$work/model:/opt/ml/model:ro" --volume "$work/output:/output"
)
name=$(basename "$STACK")

check() { # compare the result with the input, inside of the image, which has what it takes
    "$ENGINE" run --rm --pull never --interactive --network none \
        --volume "$work/input:/input:ro" --volume "$work/output:/output:ro" \
        --entrypoint python "$IMAGE" - "/input/$SOCKET/$name" "/output/$RESULT/$name" <<'PYTHON'
import sys
import numpy as np
import tifffile
noisy = tifffile.imread(sys.argv[1])
with tifffile.TiffFile(sys.argv[2]) as tif:
    denoised, tags = tif.asarray(), tif.pages[0].tags
assert (denoised.shape, denoised.dtype) == (noisy.shape, noisy.dtype), (denoised.shape, denoised.dtype)
assert tags["ResolutionUnit"].value in (2, 3) and tags["XResolution"].value[0] and tags["YResolution"].value[0]
difference = [float(np.square(np.diff(stack.astype(np.float32), axis=0)).mean()) for stack in (noisy, denoised)]
assert difference[1] < difference[0], difference
print(f"ok: {denoised.shape} {denoised.dtype}, frame-to-frame variance {difference[0]:.4g} -> {difference[1]:.4g}")
PYTHON
}

if [[ "$API" == exec ]]; then
    "$ENGINE" run --rm "${options[@]}" "$IMAGE" "${arguments[@]}"
    check
    exit
fi

ask() { # METHOD PATH: the status, asked from inside of the container, which has no network
    "$ENGINE" exec "$container" python -c '
import sys, urllib.error, urllib.request
request = urllib.request.Request("http://127.0.0.1:4743" + sys.argv[2], method=sys.argv[1])
try:
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print(0)' "$1" "$2"
}

"$ENGINE" run --detach "${options[@]}" "$IMAGE" "${arguments[@]}" >/dev/null
for _ in $(seq 100); do
    [[ "$(ask GET /health)" == 200 ]] && break
    sleep 3
done
hashes=()
for job in 1 2; do
    status=$(ask POST /invoke)
    [[ "$status" == 201 ]] || { "$ENGINE" logs "$container" >&2; echo "job $job: status $status" >&2; exit 1; }
    check
    hashes+=("$("$ENGINE" exec "$container" sha256sum "/output/$RESULT/$name")")
    "$ENGINE" exec "$container" sh -c 'rm -rf /output/*'
done
if [[ "${hashes[0]}" == "${hashes[1]}" ]]; then
    echo "ok: both jobs gave the same result"
elif [[ -n "${GPUS:-}" ]]; then
    echo "warning: the second job gave another result than the first; a GPU's last bits may differ" >&2
else
    echo "the second job gave another result than the first" >&2
    exit 1
fi
