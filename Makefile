# make demo: set up, prepare a small real model, ask it both ways.   make test: set up, run the tests.
# GPU builds: CMAKE_ARGS="-DGGML_CUDA=on" make demo
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STOCK  := build/stock/package
# what the native build is made of: editing a page of documentation builds nothing
NATIVE := pyproject.toml CMakeLists.txt constraints.txt \
          $(wildcard csrc/*.h csrc/*.cpp third_party/*.py third_party/*.txt third_party/*.pth third_party/patches/*/*) \
          $(wildcard build/page/LICENSES)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

MACHINE := epyc-zen4-2-cores
.PHONY: demo page page-test test test-slow lint architectures wheel wheel-arm vulkan avx2 arm windows macos amx bench \
        quality docs soak licences audit pin clean

demo: $(VENV)/.installed
	$(BIN)/python -m tools.demo

# the server's web page, which needs npm; everything that is built later carries it
page: $(VENV)/.installed
	$(BIN)/python -m tools.build_page
	$(MAKE) $(VENV)/.installed

# the page in Chromium, which has to be installed; POP_SCREENSHOTS=DIR keeps pictures
page-test: page
	$(BIN)/python -m pip install --quiet -c constraints.txt --group page
	$(BIN)/python -m pytest -m browser tests/browser

test: $(VENV)/.installed $(STOCK)/.installed
	rm -f build/report.jsonl
	POP_REPORT=build/report.jsonl $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not browser"

# formatting, likely mistakes, and types; `ruff check --fix`, `ruff format` and `clang-format -i csrc/*` mend most of it
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp tests/amx/*.cpp tests/programs/*.cpp

test-slow: $(VENV)/.installed $(STOCK)/.generator
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[eval]" --no-build-isolation
	$(BIN)/python -m pytest -m slow

# every architecture against a reference that stock llama.cpp makes alone; about 10 minutes on 2 cores
architectures: $(VENV)/.installed $(STOCK)/.generator
	$(BIN)/python -m tools.architectures docs/architectures.md

# a wheel for glibc 2.17 or newer, in build/wheel/repaired, and its tests. It carries the web page if that was built
wheel: ARCH := $(shell uname -m)
wheel: PLATFORM := manylinux_2_17_$(ARCH)
# the same for aarch64 on another machine, in build/wheel-arm/repaired; its tests run in qemu. auditwheel takes the names
# of this machine's platforms alone, and finds the one of other wheels itself
wheel-arm: ARCH := aarch64
wheel-arm: PLATFORM := auto
wheel wheel-arm: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group wheel
	rm -rf build/$@/built build/$@/repaired
	@echo "building the wheel: 20 minutes or more on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" _PYTHON_HOST_PLATFORM=linux-$(ARCH) $(BIN)/python -m pip wheel --quiet --no-deps \
	    --no-build-isolation --wheel-dir build/$@/built -C build-dir=build/$@/native \
	    -C cmake.define.CMAKE_TOOLCHAIN_FILE="$(CURDIR)/tools/wheel/toolchain.cmake" \
	    -C cmake.define.POP_WHEEL_ARCH=$(ARCH) \
	    -C cmake.define.CMAKE_PROJECT_pypop_gguf_INCLUDE="$(CURDIR)/tools/wheel/wheel.cmake" .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --plat $(PLATFORM) -w build/$@/repaired build/$@/built/*.whl
	POP_WHEEL=$$(echo build/$@/repaired/*.whl) $(BIN)/python -m pytest tests/packaging/test_$(subst -,_,$@).py

# a build with Vulkan against the CPU; ggml uses a device that is a CPU, such as Mesa's, only where its number is given
vulkan: build/vulkan/.installed
	rm -f build/vulkan/report.jsonl
	GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES:-0} PYTHONPATH=build/vulkan/package \
	    POP_REPORT=build/vulkan/report.jsonl $(BIN)/python -m pytest tests/engine/test_gpu.py

# a build without AVX-512 against PyTorch. Stock llama.cpp is built for this machine, so it is left out
avx2: build/avx2/.installed
	rm -f build/avx2/report.jsonl
	PYTHONPATH=build/avx2/package POP_REPORT=build/avx2/report.jsonl \
	    $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" tests/engine -k "not stock"

# a build for Linux on aarch64 against PyTorch, and its kernels against exact products, in qemu
arm: build/arm/.installed
	rm -f build/arm/report.jsonl
	POP_ARM=build/arm/bin POP_REPORT=build/arm/report.jsonl \
	    $(BIN)/python -m pytest tests/engine/test_emulated.py tests/engine/test_kernels.py

# This builds the wheel for Windows on x86-64, in build/windows/wheel, and tests it and its library in wine.
windows: $(VENV)/.installed
	rm -rf build/windows/report.jsonl build/windows/wheel
	@echo "building the wheel for Windows: 25 minutes or more on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" _PYTHON_HOST_PLATFORM=win-amd64 $(BIN)/python -m pip wheel --quiet --no-deps \
	    --no-build-isolation --wheel-dir build/windows/wheel -C build-dir=build/windows -C cmake.args=--preset=windows .
	POP_WHEEL=$$(echo build/windows/wheel/*.whl) POP_WINDOWS=build/windows/bin POP_REPORT=build/windows/report.jsonl \
	    $(BIN)/python -m pytest tests/packaging/test_wheel_windows.py tests/engine/test_emulated.py \
	    tests/engine/test_kernels.py

# This compiles for macOS on arm64 without Metal, and runs nothing.
macos: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group wheel
	@echo "building llama.cpp with POP for macOS: about 5 minutes on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset macos -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/macos

# a build for x86-64 with AMX, and its kernels against exact products, on a processor with AVX-512 VNNI
amx: build/amx/.installed
	rm -f build/amx/report.jsonl
	POP_AMX=build/amx/bin POP_REPORT=build/amx/report.jsonl \
	    $(BIN)/python -m pytest tests/engine/test_amx.py tests/engine/test_kernels.py

$(VENV)/.installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "pip>=25.1" scikit-build-core patch-ng cmake ninja
	@echo "building llama.cpp with POP: about 10 minutes on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet -c constraints.txt \
	    --no-build-isolation -e ".[convert,bench]" --group test
	touch $@

# the unpatched library beside ours, for comparison
$(STOCK)/.installed: tests/stock/CMakeLists.txt third_party/llama-cpp-python.txt | $(VENV)/.installed
	@echo "building unpatched llama.cpp for comparison: about 5 minutes on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/stock -B build/stock -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/stock --target llama
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --install build/stock --component stock --prefix $(STOCK) > /dev/null
	touch $@

# the runs behind the table of pruning alone in docs/speed.md; on another machine give MACHINE=its-name. Wants the
# machine for itself
bench: $(VENV)/.installed $(STOCK)/.installed
	mkdir -p build/bench
	for type in q4_k_m q8_0; do \
	    model=build/bench/llama-3.2-1b-$$type.gguf; \
	    test -f $$model || $(BIN)/pop-gguf random-model llama-3.2-1b $$model --outtype $$type || exit 1; \
	    $(BIN)/pop-gguf bench $$model --boundary 11 --prompt 16,32,64,128,256 --parallel 1 --repeat --runs 7 --decode 16 \
	        --threads 2 --stock $(STOCK) --csv bench/$(MACHINE).csv || exit 1; \
	    $(BIN)/pop-gguf bench $$model --boundary 11 --prompt 512,2048 --parallel 1 --runs 3 --decode 16 \
	        --threads 2 --stock $(STOCK) --csv bench/$(MACHINE).csv || exit 1; \
	done
	$(BIN)/pop-gguf bench build/bench/llama-3.2-1b-q4_k_m.gguf --boundary 11 --prompt 128 --parallel 8 --mixed --repeat --runs 3 \
	    --decode 8 --threads 2 --stock $(STOCK) --csv bench/$(MACHINE).csv
	$(BIN)/pop-gguf bench --from-csv bench/$(MACHINE).csv --plot bench/$(MACHINE).png

# docs/quality.md, from the figures in bench/real that `python -m tools.real_table MODEL --data DATA` has measured
quality: $(VENV)/.installed
	$(BIN)/python -m tools.quality_page

# mixed traffic on the server; MINUTES=5 is what CI runs. COMPLETE=idle or answer also completes pruned prompts
MINUTES := 60
COMPLETE := off
soak: $(VENV)/.installed
	$(BIN)/python -m tools.soak --minutes $(MINUTES) --complete $(COMPLETE)

# the licence of each installed package; a package that names none is an error
licences: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group audit
	$(BIN)/pip-licenses --from=mixed --fail-on=UNKNOWN

# known vulnerabilities of the installed packages; needs the service behind pip-audit
audit: licences
	$(BIN)/pip-audit --local --skip-editable

# another llama-cpp-python: VERSION=0.3.37, or the newest; tries the patches, builds in a copy, and runs the
# architecture table there
pin: $(VENV)/.installed
	$(BIN)/python third_party/move_pin.py $(VERSION) --build

# the documentation as a site, in build/site
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# upstream's generator of tiny random models, and its tools that rewrite files
$(STOCK)/.generator: $(STOCK)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/stock --target test-llama-archs llama-quantize llama-gguf-split
	touch $@

# a build of ours with other options, installed beside the one in the environment
build/vulkan/.installed: OPTIONS := -C cmake.define.GGML_VULKAN=ON -C cmake.define.LLAMA_BUILD_COMMON=OFF \
    -C cmake.define.LLAMA_BUILD_TOOLS=OFF
build/avx2/.installed: OPTIONS := -C cmake.define.GGML_NATIVE=OFF
build/vulkan/.installed build/avx2/.installed: build/%/.installed: $(VENV)/.installed
	@echo "building llama.cpp with POP for $*: about 15 minutes on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --upgrade \
	    --target build/$*/package -C build-dir=build/$*/native $(OPTIONS) .
	touch $@

# This builds the library for aarch64, and the programs that tests run with it.
build/arm/.installed: $(VENV)/.installed $(wildcard tests/arm/* tests/programs/*)
	@echo "building llama.cpp with POP for aarch64: 20 minutes or more on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset arm -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/arm
	touch $@

build/amx/.installed: $(VENV)/.installed $(wildcard tests/amx/* tests/programs/*)
	@grep -q avx512_vnni /proc/cpuinfo || { echo "make amx needs Linux and a processor with AVX-512 VNNI" >&2; exit 1; }
	@echo "building ggml with POP for AMX: a few minutes on 2 cores, once"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset amx -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/amx --target products emulated-tiles
	touch $@

clean:
	rm -rf build demo $(VENV)
