from setuptools import find_packages, setup
setup(packages=find_packages(include=["roberta_fast", "roberta_fast.*"]) + ["roberta_fast.kernels"], package_dir={"roberta_fast.kernels": "kernels"})
