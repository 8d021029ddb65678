# Everything happens in an environment of the project's own. `make demo PYTHON=python3.12` chooses the Python for it.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUTPUT ?= output/fruits
SHAPES_CONFIG ?= configs/shapes/panoptic_modern.yaml
SHAPES_OUTPUT ?= output/shapes_panoptic
REFERENCES ?= tests/data/references

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: install demo demo-shapes test check

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

# K-Net Lite with ImageNet weights learns from 12 photos; 6 others are for evaluation and for the pictures.
demo: $(INSTALLED)
	$(BIN)/python train_net.py --config-file configs/fruits/instance_lite0.yaml OUTPUT_DIR $(DEMO_OUTPUT)
	$(BIN)/python demo/compare.py --config-file configs/fruits/instance_lite0.yaml --number 6 \
		--output $(DEMO_OUTPUT)/comparison.png --opts MODEL.WEIGHTS $(DEMO_OUTPUT)/model_final.pth
	$(BIN)/python tools/export_model.py $(DEMO_OUTPUT)/model_final.pth $(DEMO_OUTPUT)/model.onnx
	$(BIN)/python tools/onnx_runner.py $(DEMO_OUTPUT)/model.onnx demo/fruits_nuts/images/0.jpg \
		--output $(DEMO_OUTPUT)/onnx.png

# Trains from scratch on generated images.
demo-shapes: $(INSTALLED)
	$(BIN)/python train_net.py --config-file $(SHAPES_CONFIG) OUTPUT_DIR $(SHAPES_OUTPUT)
	$(BIN)/python demo/compare.py --config-file $(SHAPES_CONFIG) --output $(SHAPES_OUTPUT)/comparison.png \
		--opts MODEL.WEIGHTS $(SHAPES_OUTPUT)/model_final.pth

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Hours: checks/README.md says what each check proves; the result goes to checks/LAST_RUN.json.
check: $(INSTALLED)
	test -f $(SHAPES_OUTPUT)/model_final.pth || $(MAKE) demo-shapes
	$(BIN)/python -m checks --references $(REFERENCES) --weights $(SHAPES_OUTPUT)/model_final.pth
