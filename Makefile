# Everything happens in an environment of the project's own. `make demo PYTHON=python3.12` chooses the Python for it.
PYTHON ?= python3
VENV ?= .venv
DEMO_CONFIG ?= configs/shapes/panoptic.yaml
DEMO_OUTPUT ?= output/shapes_panoptic
REFERENCES ?= tests/data/references

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: install demo test check

install: $(INSTALLED)

# Written last, so that an interrupted installation is repeated.
$(INSTALLED): requirements.txt setup.py knet_d2/setup/install_detectron2.py knet_d2/setup/dependencies.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(BIN)/python -m pip --version || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet pip==26.2
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m knet_d2.install_detectron2
	# The evaluators of LVIS and Cityscapes declare another OpenCV and "typing", which would break the environment.
	# Without them their tests are skipped.
	-$(BIN)/python -m pip install --quiet --no-deps lvis==0.5.3 cityscapesscripts==2.3.0
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: $(INSTALLED)
	$(BIN)/python train_net.py --config-file $(DEMO_CONFIG) OUTPUT_DIR $(DEMO_OUTPUT)
	$(BIN)/python demo/compare.py --config-file $(DEMO_CONFIG) --output $(DEMO_OUTPUT)/comparison.png \
		--opts MODEL.WEIGHTS $(DEMO_OUTPUT)/model_final.pth

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Hours: checks/README.md says what each check proves; the result goes to checks/LAST_RUN.json.
check: $(INSTALLED)
	test -f $(DEMO_OUTPUT)/model_final.pth || $(MAKE) demo
	$(BIN)/python -m checks --references $(REFERENCES) --weights $(DEMO_OUTPUT)/model_final.pth
