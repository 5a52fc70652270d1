# IMPALA with DeepMind Lab, which is built from source.
#
#   docker build -t impala .
#   docker run -v impala-logs:/tmp/agent -v impala-maps:/tmp/level_cache \
#     impala --num_actors=4 --batch_size=2
#   docker run -v impala-logs:/tmp/agent impala --mode=test
#
# No container engine has built this file. Step by step:
#
#   python    run in a bare Debian 12 (Python 3.11). For Python 3.10, pip finds
#             all of requirements.txt.
#   lab       apt-get and pip: run in that Debian. The edit of WORKSPACE: run on
#             a copy of upstream's. NOT TRIED, for they need GitHub: Bazelisk,
#             the clone, Bazel's build, upstream's script that makes the wheel.
#   project   run in that Debian, but for the wheel.
#   final     apt-get, the copies, the program's start: run in a second bare
#             Debian. NOT TRIED: the reset of levels; the same lines ran with
#             the tests' stand-in for DeepMind Lab. The program itself has run
#             with the real one, Python 3.11 and NumPy 2.2.
#   Nothing was run on Ubuntu 22.04 itself.
#
# Of DeepMind Lab's build, each step says where it comes from:
#   [build.md]   https://github.com/google-deepmind/lab, docs/users/build.md
#   [pip]        python/pip_package/README.md there
#   [issue 258]  of that repository: what its build needs in 2026
#   [ours]       this project's own
#
# Meant for linux/amd64. Ubuntu drops old versions of its packages, so none are
# named:
# hadolint global ignore=DL3008

# Of the time of DeepMind Lab's last change, January 2023: its build asks
# Python's distutils for headers, which Python 3.12 doesn't have any more.
ARG UBUNTU=22.04

# ------------------------------------------------------------- stage: python
# The virtual environment, with all of Python but DeepMind Lab. [ours]
FROM ubuntu:${UBUNTU} AS python

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y \
      --no-install-recommends \
      g++ make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
COPY requirements.txt /opt/impala/
RUN pip install --no-cache-dir -r /opt/impala/requirements.txt

# ---------------------------------------------------------------- stage: lab
# Builds deepmind_lab's wheel. Nothing but the wheel leaves this stage.
FROM python AS lab

# [build.md] the first line, without Python 2. NumPy is that of the virtual
# environment. [ours] the second line: what Bazel and the next steps call.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y \
      --no-install-recommends \
      freeglut3-dev gettext libffi-dev libosmesa6-dev libsdl2-dev python3-dev zip \
      ca-certificates curl git patch unzip \
    && rm -rf /var/lib/apt/lists/*

# [pip] asks for these; the PIL of [build.md] has come with Matplotlib.
RUN pip install --no-cache-dir setuptools==80.9.0 wheel==0.45.1

# [build.md] asks for Bazel. [ours] Bazelisk, which fetches the version that
# [issue 258] names.
ARG BAZELISK_VERSION=1.28.1
ENV USE_BAZEL_VERSION=7.6.1
RUN curl --fail --location --silent --show-error --output /usr/local/bin/bazel \
      "https://github.com/bazelbuild/bazelisk/releases/download/v${BAZELISK_VERSION}/bazelisk-linux-amd64" \
    && chmod +x /usr/local/bin/bazel

# [build.md] the clone. [ours] the last commit of January 2023.
ARG DMLAB_COMMIT=b1db91af5b4d2f3a24466f4632a3e5e1b0829cca
WORKDIR /src/lab
RUN git clone https://github.com/google-deepmind/lab.git . \
    && git checkout "${DMLAB_COMMIT}"

# [issue 258] Abseil of that time instead of its newest, and no Bazel modules.
# [build.md] C++17. [ours] fails where there is no such line to change.
ARG ABSEIL_VERSION=20230125.3
RUN sed -i -e "s#abseil-cpp-master#abseil-cpp-${ABSEIL_VERSION}#" \
      -e "s#abseil-cpp/archive/master#abseil-cpp/archive/refs/tags/${ABSEIL_VERSION}#" \
      WORKSPACE \
    && grep "abseil-cpp-${ABSEIL_VERSION}" WORKSPACE \
    && grep "tags/${ABSEIL_VERSION}" WORKSPACE \
    && printf '%s\n' 'common --enable_bzlmod=false' \
      'common --enable_workspace=true' 'build --cxxopt=-std=c++17' >> .bazelrc

# [pip] Bazel asks the first python3 in PATH for its headers and NumPy's: those
# of the virtual environment, which will load the module.
RUN bazel build -c opt //python/pip_package:build_pip_package \
    && PYTHON_BIN_PATH=/opt/venv/bin/python3 \
      ./bazel-bin/python/pip_package/build_pip_package /tmp/dmlab_pkg

# ------------------------------------------------------------ stage: project
# Compiles this project's TensorFlow operations, installs the wheel. [ours]
FROM python AS project

# The sources are named: `COPY . .` could bring operations compiled elsewhere.
WORKDIR /opt/impala
COPY Makefile system_packages.sh *.py *.cc ./
COPY flagfiles flagfiles
RUN make ops PYTHON=python

COPY --from=lab /tmp/dmlab_pkg /tmp/dmlab_pkg
RUN pip install --no-cache-dir --no-deps /tmp/dmlab_pkg/*.whl

# -------------------------------------------------------------- final image
FROM ubuntu:${UBUNTU}

# [ours] what DeepMind Lab's renderers load: OSMesa for 'software', GL and EGL
# for 'hardware'.
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

# [ours] A missing library shows now instead of in an actor: a level whose map
# is part of the wheel, and one whose map is compiled, are reset and drawn.
RUN python -c "import numpy as np, deepmind_lab; \
play = lambda lab: ( \
    lab.reset(seed=1), lab.step(np.zeros([7], np.intc), num_steps=4), \
    lab.observations()['RGB_INTERLEAVED'].shape, lab.close())[2]; \
shapes = [play(deepmind_lab.Lab(level, ['RGB_INTERLEAVED'], \
    config={'width': '96', 'height': '72'}, renderer='software')) for level in \
    ('seekavoid_arena_01', 'contributed/dmlab30/explore_goal_locations_small')]; \
assert shapes == [(72, 96, 3)] * 2, shapes"

# --logdir's default: checkpoints and summaries.
VOLUME /tmp/agent
# Compiled maps, up to 40 s of reset time each. Keep them between runs.
VOLUME /tmp/level_cache

# psychlab_arbitrary_visuomotor_mapping and psychlab_continuous_recognition (and
# with them --level_name=dmlab30) show photographs of Brady, Konkle, Alvarez and
# Oliva (2008), which are part of neither DeepMind Lab nor this image. Fetch and
# convert them on the host as upstream's data/brady_konkle_oliva2008/README.md
# says, then add
#   -v /path/to/data:/data:ro   and   --dataset_path=/data
ENTRYPOINT ["python", "experiment.py", "--level_cache_dir=/tmp/level_cache"]
