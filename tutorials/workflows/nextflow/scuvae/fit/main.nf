process SCUVAE_FIT {
    tag "$meta.id"
    label 'process_medium'

    conda "${moduleDir}/environment.yml"

    input:
    tuple val(meta), path(h5ad, stageAs: 'input/*')

    output:
    tuple val(meta), path("${prefix}.h5ad"), emit: h5ad
    tuple val(meta), path("${prefix}.json"), emit: json
    path "versions.yml"                    , emit: versions

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    scuvae fit ${h5ad} \\
        -o ${prefix}.h5ad \\
        --json ${prefix}.json \\
        --threads ${task.cpus} \\
        ${args}

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        scuvae: \$(scuvae --version | sed 's/scuvae //')
    END_VERSIONS
    """

    stub:
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    scuvae fit ${h5ad} -o ${prefix}.h5ad --dry-run
    touch ${prefix}.h5ad ${prefix}.json

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        scuvae: \$(scuvae --version | sed 's/scuvae //')
    END_VERSIONS
    """
}
