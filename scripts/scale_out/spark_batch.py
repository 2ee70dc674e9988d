#!/usr/bin/env python3
"""Answers a file of requests with `bitnet batch` on a Spark cluster; the answers are a folder of part files, as Spark writes it.

    spark-submit --conf spark.task.cpus=16 scripts/scale_out/spark_batch.py hdfs:///requests.jsonl hdfs:///answers \\
        --partitions 64 -- bitnet batch -m microsoft/bitnet-b1.58-2B-4T

Needs pyspark and the program behind `--` on every machine. A task has as many threads as `spark.task.cpus`; one that fails is
run again whole.
"""

import argparse
import pathlib

from pyspark.sql import SparkSession


def main():
    """Cuts the requests into partitions; each is one run of the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", help="file or folder, local or of HDFS")
    parser.add_argument("output", help="folder that does not exist yet")
    parser.add_argument("--partitions", type=int, default=8, help="tasks; each loads the model once")
    parser.add_argument("command", nargs="+", help="bitnet batch and its options, behind --")
    args = parser.parse_args()

    context = SparkSession.builder.appName("bitnet batch").getOrCreate().sparkContext
    context.addPyFile(str(pathlib.Path(__file__).resolve().parent / "answer.py"))
    threads = int(context.getConf().get("spark.task.cpus", "1"))
    command = args.command

    def partition(lines):
        from answer import answer  # here, as only the executors have it

        return answer((line for line in lines if line.strip()), command, threads)

    context.textFile(args.input).repartition(args.partitions).mapPartitions(partition).saveAsTextFile(args.output)


if __name__ == "__main__":
    main()
