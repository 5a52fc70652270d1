# IMPALA with DeepMind Lab, everything built from source.
#
#   docker build -t impala .
#   docker run -v impala-logs:/tmp/agent -v impala-maps:/tmp/level_cache \
#     impala --num_actors=4 --batch_size=2
#   docker run -v impala-logs:/tmp/agent impala --mode=test
#
# NOTHING IN THIS FILE HAS BEEN RUN. It was written without a container engine
# and without access to GitHub, so neither the image nor any single step of
# stage `lab` has ever been built. What was checked, outside of a container and
# with Python 3.11: TensorFlow 2.21.0 and dm-sonnet 2.0.2 import and compute
# V-trace correctly beside numpy 1.26.4 (see stage `project` for why that
# matters), and pip finds a matching set of wheels for Python 3.12.
#
# Where the steps come from:
#   [upstream]  documented in https://github.com/google-deepmind/lab, in
#               docs/users/build.md and python/pip_package/README.md; written
#               down from memory, so compare them first if one fails.
#   [ours]      this project's own steps.
#   [guess]     neither; look here first when the build fails.
#
# Meant for linux/amd64.

# Ubuntu 24.04 has Python 3.12 and still packages OSMesa, which DeepMind Lab's
# software renderer draws with; newer Mesa releases have dropped it.
ARG UBUNTU=24.04

# ---------------------------------------------------------------- stage: lab
# Builds deepmind_lab's wheel. Nothing but the wheel leaves this stage.
FROM ubuntu:${UBUNTU} AS lab

# [upstream] the libraries and the Python packages. [guess] python-is-python3
# (in case a script calls `python`), setuptools and wheel under these names, and
# that Ubuntu's NumPy 1.26 headers are the ones the build finds.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y \
      --no-install-recommends \
      build-essential ca-certificates curl git patch unzip zip \
      freeglut3-dev gettext libffi-dev libosmesa6-dev libsdl2-dev \
      python-is-python3 python3-dev python3-numpy python3-pil \
      python3-setuptools python3-wheel \
    && rm -rf /var/lib/apt/lists/*

# [upstream] asks for Bazel. [ours] gets it through Bazelisk, pinned; a build
# that has to be reproducible should verify the download's checksum as well.
ARG BAZELISK_VERSION=1.28.1
RUN curl --fail --location --silent --show-error --output /usr/local/bin/bazel \
      "https://github.com/bazelbuild/bazelisk/releases/download/v${BAZELISK_VERSION}/bazelisk-linux-$(dpkg --print-architecture)" \
    && chmod +x /usr/local/bin/bazel

# [guess] DeepMind Lab declares its dependencies in a WORKSPACE file, which
# Bazel 8 ignores unless told otherwise. 6.5.0 is of the time of upstream's last
# changes.
ENV USE_BAZEL_VERSION=6.5.0

# A commit instead of `master` makes the build reproducible.
ARG DMLAB_REF=master
WORKDIR /src
RUN git clone https://github.com/google-deepmind/lab.git \
    && git -C lab checkout "${DMLAB_REF}"
WORKDIR /src/lab

# [guess] upstream's build.md has one edit the paths of the Python headers where
# they differ. This sets the version in build files named python*.BUILD and does
# nothing if the checkout finds the headers in another way.
RUN find . -name 'python*.BUILD' -exec \
      sed -E -i 's#include/python3\.[0-9]+#include/python3.12#g' {} +

# [upstream] the two steps of python/pip_package/README.md. [guess] that GCC 13
# is fine with all of the code; `--build-arg BAZEL_OPTIONS=...` takes what else
# may be needed, such as `--cxxopt=-fpermissive`.
ARG BAZEL_OPTIONS=""
RUN bazel build -c opt ${BAZEL_OPTIONS} //python/pip_package:build_pip_package \
    && ./bazel-bin/python/pip_package/build_pip_package /tmp/dmlab_pkg

# ------------------------------------------------------------ stage: project
# Puts together the virtual environment (Ubuntu's own Python refuses pip, PEP
# 668) and compiles this project's TensorFlow operations. [ours]
FROM ubuntu:${UBUNTU} AS project

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y \
      --no-install-recommends \
      g++ make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}

# deepmind_lab is compiled against NumPy 1's headers, and such a module does not
# load beside NumPy 2. All the rest runs with either; the last OpenCV for both
# is 4.11.
WORKDIR /opt/impala
COPY requirements.txt ./
RUN sed -i -e 's/^numpy==[^ ]*/numpy==1.26.4/' \
      -e 's/^opencv-python-headless==[^ ]*/opencv-python-headless==4.11.0.86/' \
      requirements.txt \
    && pip install --no-cache-dir -r requirements.txt

# The name upstream documents is deepmind_lab-1.0-py3-none-any.whl; the glob
# spares us its version.
COPY --from=lab /tmp/dmlab_pkg/*.whl /tmp/dmlab_pkg/
RUN pip install --no-cache-dir --no-deps /tmp/dmlab_pkg/*.whl

# Without a .dockerignore, `COPY . .` could bring operations compiled for the
# host, so the sources are named.
COPY Makefile *.py *.cc ./
COPY flagfiles flagfiles
RUN make ops PYTHON=python

# -------------------------------------------------------------- final image
FROM ubuntu:${UBUNTU}

# [guess] the shared libraries that deepmind_lab links to or loads: OSMesa for
# renderer='software', GL and EGL for 'hardware', SDL and gettext's run time are
# only used by the interactive client.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y \
      --no-install-recommends \
      libegl1 libffi8 libgl1 libglx0 libosmesa6 python3 \
    && rm -rf /var/lib/apt/lists/*

# The virtual environment refers to /usr/bin/python3, the same in every stage.
COPY --from=project /opt/venv /opt/venv
COPY --from=project /opt/impala /opt/impala
ENV PATH=/opt/venv/bin:${PATH}
WORKDIR /opt/impala

# [ours] Finds a missing shared library now instead of in an actor: resets a
# level whose map comes with the wheel and renders a frame in software.
RUN python -c "import numpy as np, deepmind_lab; \
lab = deepmind_lab.Lab('seekavoid_arena_01', ['RGB_INTERLEAVED'], \
    config={'width': '96', 'height': '72'}, renderer='software'); \
lab.reset(seed=1); \
lab.step(np.zeros([7], dtype=np.intc), num_steps=4); \
assert lab.observations()['RGB_INTERLEAVED'].shape == (72, 96, 3); \
lab.close()"

# --logdir's default: checkpoints and summaries.
VOLUME /tmp/agent
# Compiled maps, 4-30 s of reset time each. Keep them between runs.
VOLUME /tmp/level_cache

# psychlab_arbitrary_visuomotor_mapping and psychlab_continuous_recognition (and
# with them --level_name=dmlab30) show photographs of Brady, Konkle, Alvarez and
# Oliva (2008), which are part of neither DeepMind Lab nor this image. Fetch and
# convert them on the host as upstream's data/brady_konkle_oliva2008/README.md
# says, then add
#   -v /path/to/data:/data:ro   and   --dataset_path=/data
ENTRYPOINT ["python", "experiment.py", "--level_cache_dir=/tmp/level_cache"]
