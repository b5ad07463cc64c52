-- Acknowledge an operation that removes or copies rows: journal it, and drop the thread's hot state, so that the
-- next checkpoint must carry every channel and cannot rely on a blob that the operation removes.
-- KEYS: journal, shard, dirty, namespaces
-- ARGV: thread, record, stem of the thread's hot keys, '1' = the records before it need not be flushed,
--       generation, run lease ('' = none)
-- Returns {sequence number, the previous record's}.
local state, refusal = enter(KEYS[2], ARGV[1], ARGV[5], given(ARGV[6]))
if refusal then return refusal end
-- The hot keys share the declared keys' hash tag.
for _, ns in ipairs(redis.call('SMEMBERS', KEYS[4])) do
  redis.call('DEL', ARGV[3] .. ns)
  -- Otherwise writes whose checkpoint has not come stay in the cold tier, which whoever reads the next checkpoint asks,
  -- because the thread and namespace have been seen.
  if ARGV[4] == '1' then redis.call('HDEL', KEYS[2], early_mark(ARGV[1], ns)) end
end
redis.call('DEL', KEYS[4])
local superseded = ARGV[4] == '1' and state.tail
if superseded then state.tail = nil end
local reply = append(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2], state)
-- Not deleted and made anew, for the sake of a slot that moves.
if superseded then redis.call('XTRIM', KEYS[1], 'MINID', reply[1] .. '-0') end
return reply
