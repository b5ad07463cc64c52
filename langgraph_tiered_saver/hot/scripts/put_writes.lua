-- Acknowledge writes: append their record to the journal and, unless their checkpoint is an older one, keep them hot.
-- KEYS: hot hash, journal, shard, dirty, namespaces
-- ARGV: thread, record, ttl in ms ('0' = none), ttl of the namespaces
-- Returns {sequence number, the previous record's}.
local hot = KEYS[1]
local record = unframe(ARGV[2])
local id = record[3]
local known = redis.call('HMGET', hot, 'id', 'u', 'l', 'e')
local current = known[1]
local reply = append(KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2])
if known[3] then redis.call('HDEL', hot, 'l') end
if current and id < current then return reply end
if not current then
  -- Earlier writes of the same checkpoint may have left the hot tier; whoever reads it must ask the cold one.
  -- The shard keeps that in mind too, because the hash may be evicted before the checkpoint comes.
  if not known[2] or known[2] < id then
    redis.call('HSET', hot, 'u', id)
    redis.call('HSET', KEYS[3], early_mark(ARGV[1], record[2]), id)
  end
  redis.call('SADD', KEYS[5], record[2])
else
  local command = record[6] == '1' and 'HSET' or 'HSETNX'
  local stem = 'w:' .. id .. '\0' .. record[4] .. '\0'
  local added = 0
  for i = 7, #record, 3 do
    local value = record[5] .. '\0' .. record[i + 1] .. '\0' .. record[i + 2]
    added = added + redis.call(command, hot, stem .. record[i], value)
  end
  if added > 0 then redis.call('HINCRBY', hot, 'wn', added) end
end
keep_alive(hot, KEYS[5], ARGV[3], ARGV[4], reply[1], current and known[4])
return reply
