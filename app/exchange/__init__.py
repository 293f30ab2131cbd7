"""Evidence in other programs' formats: Neuronpedia's exports, sae_dashboard's batches, parquet tables.

    rows          one feature and its examples as rows under Neuronpedia's column names, judged; both directions
    imported      a place in the catalog for evidence that comes without model, weights or corpus
    neuronpedia   export directories, read and written
    sae_dashboard batches of JSON, read and written
    tables        parquet tables, written

SAE Atlas' own format, which loses nothing, is app.bundles.
"""
