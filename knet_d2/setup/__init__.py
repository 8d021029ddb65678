"""The environment of the package: dependencies, installing Detectron2, the doctor, and support of other versions."""
