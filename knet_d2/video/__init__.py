"""Video: objects are followed from frame to frame by their kernels (Video K-Net, CVPR 2022).

:mod:`.tracker` is the rule, in NumPy. The other modules bring it to models, data sets, evaluators and programs.
"""
