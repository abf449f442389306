#!/usr/bin/env bash
# Builds the image of docker/Dockerfile with buildah: no Docker daemon, no registry of images. The base image is a minimal
# Debian that debootstrap makes. Needs root and Debian's or Ubuntu's packages buildah and debootstrap.
#
#   docker/build_without_daemon.sh [OPTION ...] [-- OPTION OF buildah build ...]
#
# --tag NAME        Of the image (default moe-train:cpu).
# --device NAME     cpu (default) or cuda.
# --suite NAME      Of Debian, 12 or newer (default bookworm).
# --mirror URL      Of Debian (default http://deb.debian.org/debian).
# --security-mirror URL
#                   Of Debian's security updates (default http://deb.debian.org/debian-security); none goes without.
# --base NAME       The base image (default moe-train-base:SUITE); one that is there already is used as it is.
# --wheels FOLDER   Python packages, read before any index. Offline altogether: with --pip-args --no-index. One is filled,
#                   with the Python version of the suite (3.11 in bookworm), by
#                     pip download -d FOLDER -c requirements/constraints.txt torch==VERSION+cpu setuptools '.[test]'
# --pip-args "..."  Further arguments of pip install.
# --ca FILE         Certificates to trust in the build, behind a proxy that has its own; not kept in the image.
# --archive FILE    Also write the image as a file for `docker load -i FILE` or `podman load -i FILE`.
#
# Images lie where buildah keeps them; STORAGE_DRIVER=vfs and BUILDAH_ISOLATION=chroot (default here) do without kernel
# features that containers within containers lack. Then, for example,
#   container=$(buildah from moe-train:cpu)
#   buildah run --isolation chroot --hostname localhost "$container" docker/entrypoint.sh \
#       torchrun --nproc-per-node 2 launch/train.py ...   # a host name of its own would have no address
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}

usage() {
  echo "build_without_daemon.sh: $1" >&2
  echo "usage: docker/build_without_daemon.sh [OPTION ...] [-- OPTION OF buildah build ...]; its first lines list them" >&2
  exit 2
}

tag=moe-train:cpu device=cpu suite=bookworm mirror=http://deb.debian.org/debian
security_mirror=http://deb.debian.org/debian-security
base='' wheels='' pip_args='' ca='' archive=''
while [[ $# -gt 0 && $1 != -- ]]; do
  [[ $# -ge 2 ]] || usage "$1: unknown, or its value is missing"
  case $1 in
    --tag) tag=$2 ;;
    --device) device=$2 ;;
    --suite) suite=$2 ;;
    --mirror) mirror=$2 ;;
    --security-mirror) security_mirror=$2 ;;
    --base) base=$2 ;;
    --wheels) wheels=$2 ;;
    --pip-args) pip_args=$2 ;;
    --ca) ca=$2 ;;
    --archive) archive=$2 ;;
    *) usage "$1: no such option (is -- missing before one of buildah's?)" ;;
  esac
  shift 2
done
[[ $# == 0 ]] || shift
base=${base:-moe-train-base:$suite}
[[ $device == cpu || $device == cuda ]] || usage "--device ($device) must be cpu or cuda"
[[ -z $wheels || -d $wheels ]] || usage "--wheels ($wheels) must be a folder"
[[ -z $ca || -f $ca ]] || usage "--ca ($ca) must be a file"
[[ -z $archive || ! -e $archive ]] || usage "--archive ($archive) exists already"
[[ $(id -u) == 0 ]] || usage "debootstrap needs root"
for command in buildah debootstrap; do
  command -v "$command" >/dev/null || usage "$command is not installed: apt-get install buildah debootstrap"
done

temporary=$(mktemp -d)
container=''
tidy() {
  if [[ -n $container ]]; then buildah rm "$container" >/dev/null; fi
  rm -rf "$temporary"
}
trap tidy EXIT

make_base() {
  echo "Making $base: Debian $suite from $mirror"
  debootstrap --variant=minbase "$suite" "$temporary/root" "$mirror" >"$temporary/log" 2>&1 ||
    { tail -n 20 "$temporary/log" >&2; exit 1; }
  {
    echo "deb $mirror $suite main"
    echo "deb $mirror $suite-updates main"
    if [[ $security_mirror != none ]]; then echo "deb $security_mirror $suite-security main"; fi
  } >"$temporary/root/etc/apt/sources.list"
  chroot "$temporary/root" sh -c 'apt-get update && apt-get -y upgrade' </dev/null >"$temporary/log" 2>&1 ||
    { tail -n 20 "$temporary/log" >&2; exit 1; }
  rm -rf "$temporary"/root/var/cache/apt/archives/*.deb "$temporary"/root/var/lib/apt/lists/* "$temporary"/root/dev/*
  tar -C "$temporary/root" -cf "$temporary/root.tar" .
  rm -rf "$temporary/root"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$temporary/root.tar" / >/dev/null
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd bash "$container"
  buildah commit --quiet "$container" "$base" >/dev/null
  buildah rm "$container" >/dev/null
  container=''
  rm -f "$temporary/root.tar"
}

started=$SECONDS
buildah inspect --type image "$base" >/dev/null 2>&1 || make_base
options=()
if [[ -n $wheels ]]; then options+=(--volume "$(readlink -f "$wheels"):/wheels:ro"); fi
if [[ -n $ca ]]; then
  options+=(--volume "$(readlink -f "$ca"):/run/ca.crt:ro")
  pip_args="--cert /run/ca.crt $pip_args"
fi
buildah build --file docker/Dockerfile --tag "$tag" --network host --pull-never \
  --build-arg "BASE_IMAGE=$base" --build-arg "DEVICE=$device" --build-arg "PIP_ARGS=$pip_args" "${options[@]}" "$@" .
size=$(buildah images --format '{{.Size}}' "$tag" | head -n 1)
echo "Built $tag ($size) in $((SECONDS - started)) s"
if [[ -n $archive ]]; then buildah push --quiet "$tag" "docker-archive:$archive:$tag"; fi
