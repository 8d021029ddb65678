# The HTTP service on CPUs: see docs/DEPLOYMENT.md.
FROM python:3.12-slim
WORKDIR /knet_d2
# PyTorch without CUDA is a tenth of the size
RUN pip install --no-cache-dir torch==2.14.1 torchvision==0.29.1 --index-url https://download.pytorch.org/whl/cpu
COPY LICENSE NOTICE README.md setup.py knet_command.py ./
COPY configs configs
COPY docs docs
COPY knet_d2 knet_d2
RUN pip install --no-cache-dir ".[opencv,safetensors,serve]" && python -m knet_d2.install_detectron2
USER nobody
# glibc keeps memory between images, which saves time
ENV MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 FVCORE_CACHE=/tmp/fvcore
EXPOSE 8000
ENTRYPOINT ["python", "-m", "knet_d2", "serve", "--host", "0.0.0.0"]
CMD ["--weights", "/model/model.safetensors"]
