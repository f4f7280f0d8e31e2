BEGIN TRANSACTION;
CREATE TABLE answers (
    source TEXT NOT NULL, prompt BLOB NOT NULL, sample INTEGER NOT NULL, text TEXT NOT NULL, finish_reason TEXT,
    tokens INTEGER, PRIMARY KEY (source, prompt, sample));
INSERT INTO "answers" VALUES('teacher',X'A794C1EADE59875E7EF95F23EBF1F62E',0,'null','prompt_too_long',NULL);
INSERT INTO "answers" VALUES('teacher',X'B7B274CB9A20F26FE5DFAD899B63BF57',0,'null','prompt_too_long',NULL);
INSERT INTO "answers" VALUES('teacher',X'CCF87D9F7E256008A6FC1A27EB608122',0,'null','prompt_too_long',NULL);
INSERT INTO "answers" VALUES('teacher',X'F4EB89FB3BC5C9BFD1EFEFBD5C14B2C3',0,'null','prompt_too_long',NULL);
INSERT INTO "answers" VALUES('teacher',X'036148D60341797020CCFC7512E4523E',0,'null','prompt_too_long',NULL);
INSERT INTO "answers" VALUES('teacher',X'E51028DE480EFCE7A0D4528F34E2D06F',0,'null','prompt_too_long',NULL);
CREATE TABLE labels (
    preference BLOB NOT NULL, key BLOB NOT NULL, value REAL, PRIMARY KEY (preference, key)) WITHOUT ROWID;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "settings" VALUES('teacher','{"source": "server", "model": "m", "endpoint": "chat", "system_prompt": null, "extra": {}, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 256, "stop": [], "seed": 0}');
INSERT INTO "settings" VALUES('student','{"sampler": "column", "column": "by_student"}');
INSERT INTO "settings" VALUES('preference','{"preference": "teacher_wins"}');
INSERT INTO "settings" VALUES('shard','null');
INSERT INTO "settings" VALUES('usage teacher','{"requests": 6, "retries": 0, "prompt_tokens": 0, "completion_tokens": 0, "unreported": 0, "cost": 0.0}');
COMMIT;
PRAGMA user_version = 1;
