-- Answers given under an Idempotency-Key, written in the transaction of their effect (saga-core/src/http/idempotency.rs).
--
-- A repeated request finds its answer here and has no second effect. The key is scoped by operation and caller, so that
-- two customers may use the same key. `fingerprint` is the SHA-256 of the request: the same key with another request is
-- refused. Only the headers that mean something later are kept. Rows are only inserted and, one day, dropped by age;
-- nobody updates them.
create table idempotency_answer (
    scope       text        not null,
    key         text        not null,
    fingerprint bytea       not null,
    status      smallint    not null,
    location    text,
    etag        text,
    body        bytea       not null,
    created_at  timestamptz not null default now(),

    constraint idempotency_answer_pkey primary key (scope, key),
    constraint idempotency_answer_key_length check (length(key) between 1 and 200),
    constraint idempotency_answer_fingerprint_sha256 check (octet_length(fingerprint) = 32),
    constraint idempotency_answer_status_success check (status between 200 and 299)
);
