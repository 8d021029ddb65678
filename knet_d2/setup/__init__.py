"""The environment of the package: its dependencies, installing Detectron2, the doctor, other packages' versions."""
