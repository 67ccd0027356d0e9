"""Build of rendseg; settings are printed first and nothing is downloaded."""

import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="rendseg",
    version="0.1.0.dev0",
    packages=["rendseg"],
    ext_modules=[
        CppExtension(
            "rendseg._C",
            sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")),
            extra_compile_args=["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
