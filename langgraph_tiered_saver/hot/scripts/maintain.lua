-- Acknowledge an operation that removes or copies rows: journal it, and drop the thread's hot state, so that the
-- next checkpoint must carry every channel and cannot rely on a blob that the operation removes.
-- KEYS: journal, shard, dirty, namespaces
-- ARGV: thread, record, stem of the thread's hot keys, '1' = the records before it need not be flushed
-- Returns {sequence number, the previous record's}.
-- The hot keys share the declared keys' hash tag.
for _, ns in ipairs(redis.call('SMEMBERS', KEYS[4])) do
  redis.call('DEL', ARGV[3] .. ns)
  if ARGV[4] == '1' then
    redis.call('HDEL', KEYS[2], early_mark(ARGV[1], ns))
  else
    -- Writes whose checkpoint has not come stay in the cold tier; whoever reads the next checkpoint must ask it.
    redis.call('HSET', KEYS[2], early_mark(ARGV[1], ns), any_id)
  end
end
redis.call('DEL', KEYS[4])
if ARGV[4] == '1' then
  redis.call('DEL', KEYS[1])
  redis.call('HDEL', KEYS[2], 't:' .. ARGV[1])
end
return append(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2])
